"""Plan a run before it is queued: its memory, its traffic, its time, and what the whole family costs."""

"""The study: its data sets, its ancestor, and what others have published."""

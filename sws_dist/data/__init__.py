"""Images in, batches out: manifest (what is there), sampler (in which order), recipe (what is drawn), pipeline
(DALI), mixing (on the device)."""

"""Hard negatives: the nearest texts that are no answer."""

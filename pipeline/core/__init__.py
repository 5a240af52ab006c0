"""The foundation: files on disk and in buckets, locks, artifacts, errors, logging and the Ray session."""

"""Where things lie: folders on disk, and the folders in buckets that are used as they are."""

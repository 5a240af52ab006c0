"""Where records come from: files of every kind on disk and in buckets, data sets of a hub, installed packages."""

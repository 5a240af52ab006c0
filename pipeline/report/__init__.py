"""Pages for people: a run's report, runs compared, and the map of vectors."""

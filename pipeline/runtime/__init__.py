"""What every job runs in: its command line, its log, its progress and its Ray session."""

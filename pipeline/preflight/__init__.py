"""What is looked at before a job is let loose on a cluster: room for its work, its disks, its store."""

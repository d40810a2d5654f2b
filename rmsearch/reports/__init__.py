"""Reports: HTML pages about runs and about preference sets."""

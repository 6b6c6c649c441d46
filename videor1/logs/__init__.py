"""What a run writes down and shows: lines of JSON, trackers, a progress bar, tables."""

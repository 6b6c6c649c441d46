"""One small file per host library; import the one you need."""

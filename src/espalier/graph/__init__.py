"""Model → trace, segments, coupled axes."""

"""One HTML page that compares runs: what they logged, scored and drew. It reads run folders and needs no model."""

"""A comparison of models on equal terms: what is compared, what was found with which certainty, and its page."""

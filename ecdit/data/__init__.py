"""Where images and captions come from, and the frozen encoders that read them."""

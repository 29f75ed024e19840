"""Echo-4o-Image: reading it, packing it, exporting it, and what is known about it."""

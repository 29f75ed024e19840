"""The model: configuration, the two experts, the processor and the official checkpoint layout."""

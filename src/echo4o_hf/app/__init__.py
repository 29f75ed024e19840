"""The browser app: text-to-image, references, editing and questions about pictures."""

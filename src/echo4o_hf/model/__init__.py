"""The model: configuration, the two experts, the processor and the official checkpoint layout."""

# Before any module of ours: registering with it imports our configuration, which must not be half imported then.
import transformers.models.auto.configuration_auto  # noqa: F401

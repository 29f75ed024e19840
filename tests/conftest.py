"""No test reaches the Hub, nor the user's cache of it."""

import atexit
import os
import shutil
import tempfile

# Before anything imports huggingface_hub, which reads these once.
_cache = tempfile.mkdtemp(prefix="echo4o-tests-")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
os.environ["HF_HOME"] = _cache
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

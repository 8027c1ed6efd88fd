"""What the fork server of `tests/gloo.py` imports once for all ranks."""

import tests.conftest  # noqa: F401  (environment first)
import deepspeed  # noqa: F401
import transformers  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

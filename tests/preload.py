"""What the fork server of `tests/gloo.py` imports once for all ranks."""

# isort: off
import tests.conftest  # noqa: F401  (environment first)
import deepspeed  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

"""Sets the precision of float32 products in the ways that a caller may use, and puts the settings back."""

import torch

WAYS = {
    "old": lambda: setattr(torch.backends.cuda.matmul, "allow_tf32", True),
    "matmul precision": lambda: torch.set_float32_matmul_precision("medium"),
    "new": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "new for all": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
    "convolutions": lambda: setattr(torch.backends.cudnn, "allow_tf32", True),
    "new for convolutions": lambda: setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee"),
    "old, off": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "mkldnn": lambda: setattr(torch.backends.mkldnn.matmul, "fp32_precision", "bf16"),
    "as it starts": lambda: None,
}
"""Name -> a function that sets the precision in that way."""


def reset() -> None:
    """Sets everything that a way may have changed to what torch starts with."""
    torch.backends.fp32_precision = "none"
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("highest")
    for setting in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        setting.fp32_precision = "none"

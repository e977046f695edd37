"""temporary stand-in by the lead until the real file is written: overwrite it"""

import torch
def grad_norm(grad):
    return grad.double().square().sum().sqrt().to(grad.dtype)

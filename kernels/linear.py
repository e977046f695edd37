"""temporary stand-in by the lead until the real file is written: overwrite it"""

import torch
class _L(torch.autograd.Function):
    @staticmethod
    def forward(ctx,x,w,mg):
        ctx.save_for_backward(x,w); ctx.mg=mg
        return x@w.t()
    @staticmethod
    def backward(ctx,dy):
        x,w=ctx.saved_tensors
        dx=dy@w
        dw=dy.flatten(0,-2).t()@x.flatten(0,-2)
        ctx.mg.add_(dw)
        return dx,None,None
def linear(x,weight,*,main_grad=None):
    if main_grad is None: return x@weight.t()
    return _L.apply(x,weight,main_grad)

"""temporary stand-in by the lead until the real file is written: overwrite it"""

import torch
class _A(torch.autograd.Function):
    @staticmethod
    def forward(ctx,w,mg):
        ctx.mg=mg
        return w.to(mg.dtype)
    @staticmethod
    def backward(ctx,g):
        ctx.mg.add_(g)
        return None,None
def rms_norm(x,weight,eps,residual=None,*,main_grad=None):
    if residual is not None: x=x+residual
    w=_A.apply(weight,main_grad) if main_grad is not None else weight
    f=x.to(torch.promote_types(x.dtype,torch.float32))
    y=(f*torch.rsqrt(f.square().mean(-1,keepdim=True)+eps)*w).to(x.dtype)
    return y if residual is None else (y,x)

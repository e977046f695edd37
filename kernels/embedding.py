"""temporary stand-in by the lead until the real file is written: overwrite it"""

import torch
class _E(torch.autograd.Function):
    @staticmethod
    def forward(ctx,ids,w,mg):
        ctx.mg=mg; ctx.ids=ids
        return w[ids]
    @staticmethod
    def backward(ctx,dy):
        ctx.mg.index_add_(0,ctx.ids.flatten(),dy.flatten(0,1).to(ctx.mg.dtype))
        return None,None,None
def embedding(ids,weight,*,main_grad=None):
    return weight[ids] if main_grad is None else _E.apply(ids,weight,main_grad)

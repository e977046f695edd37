"""temporary stand-in by the lead until the real file is written: overwrite it"""

import torch
@torch.no_grad()
def adamw(master,grad,m,v,weights,*,lr,beta1,beta2,eps,weight_decay,step,clip):
    g=grad*clip
    m.mul_(beta1).add_(g,alpha=1-beta1); v.mul_(beta2).addcmul_(g,g,value=1-beta2)
    t=step.double(); c1=(1-beta1**t).to(master.dtype); c2=(1-beta2**t).to(master.dtype)
    upd=(m/c1)/((v/c2).sqrt()+eps)
    master.sub_(lr*(upd+weight_decay*master))
    if weights is not None: weights.copy_(master)

"""temporary stand-in by the lead until the real file is written: overwrite it"""

import torch
def rope_tables(length,head_dim,theta,*,dtype=torch.float32,device="cpu"):
    wide=torch.float64 if dtype==torch.float64 else torch.float32
    inv=1.0/theta**(torch.arange(0,head_dim,2,dtype=wide,device=device)/head_dim)
    a=torch.outer(torch.arange(length,dtype=wide,device=device),inv)
    return a.cos().to(dtype).to(wide),a.sin().to(dtype).to(wide)
def rope(qkv,cos,sin,positions,num_heads,num_kv_heads):
    B,T,W=qkv.shape; h=2*cos.shape[1]; n=num_heads+num_kv_heads
    x=qkv[...,:n*h].view(B,T,n,h)
    c,s=(cos[positions],sin[positions]) if positions is not None else (cos[None],sin[None])
    c,s=c[:,:,None],s[:,:,None]
    a,b=x.to(c.dtype).chunk(2,-1)
    r=torch.cat([a*c-b*s,b*c+a*s],-1).to(qkv.dtype)
    return torch.cat([r.flatten(2),qkv[...,n*h:]],-1)

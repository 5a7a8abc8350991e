# Environment of every rank. Copy it, take out the comment signs you need, and give the copy as
#   L2VIT_ENVIRONMENT=my_environment.sh bash launch/pretrain.sh ...
# Lines are plain NAME=value. Over ssh (deepspeed --hostfile without --no_ssh) put the same lines
# into ~/.deepspeed_env on the node you launch from: DeepSpeed hands them to the other nodes.

# -- network
#NCCL_SOCKET_IFNAME=eth0        # the interface nodes meet on; needed where there are several
#GLOO_SOCKET_IFNAME=eth0        # the same for the control group (and for CPU ranks)
#NCCL_IB_HCA=mlx5               # InfiniBand or RoCE cards to use
#NCCL_IB_GID_INDEX=3            # RoCE v2 often needs it
#NCCL_DEBUG=INFO                # says which network NCCL chose: NET/IB is fast, NET/Socket slow
#NCCL_ASYNC_ERROR_HANDLING=1    # PyTorch's default: a broken collective ends the rank

# -- CPU
#OMP_NUM_THREADS=8              # default: a rank's share of the cores, at most 8
#DS_ACCELERATOR=cpu             # set by the launcher where there is no GPU
#L2VIT_NPROC=8                  # ranks on each node, as --nproc

# -- nothing is downloaded during a run
HF_HUB_OFFLINE=1
HF_DATASETS_OFFLINE=1

# -- memory
#PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True   # less fragmentation near the limit

''':'
# Fine-tune. Bash reads the upper half of this file, Python the lower one, so each of these works:
#   bash launch/finetune.sh --config finetune/configs/NAME.yaml [key.sub=value ...]
#   deepspeed [flags] launch/finetune.sh --config ...
#   torchrun [flags] launch/finetune.sh --config ...
#   srun bash launch/finetune.sh --config ...
# The first one supervises; `bash launch/finetune.sh --help` lists its flags. docs/cluster.md has more.
# Exit status: 0 done, 1 failed, 2 wrong configuration, 75 stopped by a signal (run it again).
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"
launch "${BASH_SOURCE[0]}" "$@"
: <<'# end of Python'
'''
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from l2vit.launch import rank

if __name__ == "__main__":  # worker processes import this file too
    raise SystemExit(rank.run("finetune.train", sys.argv[1:]))
# end of Python

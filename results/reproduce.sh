#!/usr/bin/env bash
# Every method, attack, table and figure of the paper; what is finished is kept.
#     results/reproduce.sh [method ...]     # ours transfer mixed no-at weak-at doa-4 doa-10, figure5
#     SEEDS="0 1 2" results/reproduce.sh mixed weak-at
# One photograph of each person, not twelve; G is data/demo's in both, made of 2,400 other persons:
#     RUN=runs/photographs-1 FLAGS="--images 1" results/reproduce.sh ours transfer mixed no-at weak-at doa-10 figure5
# That G again, two hours of one core:
#     results/reproduce.sh generator
# LFW, one photograph of each of half of its train persons; G is made of the other half:
#     export RUN=runs/lfw-others HALVES=LFW FLAGS="--data folder --root LFW --steps 2000 --images 1"
#     SEEDS="0 1 2" results/reproduce.sh ours mixed weak-at; SEEDS="0 2" results/reproduce.sh transfer; SEEDS="0 1" results/reproduce.sh no-at
#     FLAGS+=" --attack-steps 10 --attack-alpha 16 --select best" SEEDS="0 1 2" results/reproduce.sh doa-10
# All of LFW, after `generator.py --data folder --root LFW --run runs/lfw-0 --epochs 30 --encoder-epochs 10`:
#     export RUN=runs/lfw HALVES= FLAGS="--data folder --root LFW --steps 2000"
#     results/reproduce.sh ours weak-at no-at
#     FLAGS+=" --attack-steps 10 --attack-alpha 16" results/reproduce.sh mixed
#     FLAGS+=" --attack-steps 10 --attack-alpha 16 --attack-warmup 1000" results/reproduce.sh transfer
#     FLAGS+=" --attack-steps 10 --attack-alpha 16 --select best" results/reproduce.sh doa-10
# A public descriptor:
#     python attacks.py --run runs/model --model FILE.py:NAME --data folder --root LFW --size 64 --targets 20 --attacks clean,eyeglasses,square
#     python verify.py --run runs/model --model FILE.py:NAME --mask 14
# Plain commands, each of which goes on after a stop; on two cores start it twice with other methods.
set -euo pipefail
cd "$(dirname "$0")/.."
methods=("$@")
[ $# -gt 0 ] || methods=(ours transfer mixed no-at weak-at doa-4 doa-10 figure5)
read -ra more <<<"${FLAGS:-}"
for seed in ${SEEDS:-0}; do
  run=${RUN:-runs/synthetic-demo}-$seed
  [ -z "${HALVES:-}" ] || [ -f "$run/generator.pt" ] || {
    python - "$RUN-G" "$run" "$HALVES" <<'EOF'
import dataclasses, sys
import data
faces = data.load("folder", sys.argv[3])
split = data.split_persons(faces, None, 40, 30)
for folder, train in zip(sys.argv[1:], (split.train[::2], split.train[1::2])):
    data.write_manifest(f"{folder}/people.json", faces, dataclasses.replace(split, train=train))
EOF
    python generator.py --data folder --root "$HALVES" --run "$RUN-G"
    cp "$RUN-G/generator.pt" "$run/generator.pt"
  }
  for method in "${methods[@]}"; do
    if [ "$method" = generator ]; then # data/demo/generator.pt
      python - runs/generator <<'EOF'
import dataclasses, sys
import data
split = data.split_persons(data.load("synthetic"), None, 40, 30)
faces = data.load("synthetic", persons=2770, images_per_person=6)
data.write_manifest(f"{sys.argv[1]}/people.json", faces, dataclasses.replace(split, train=range(370, 2770)))
EOF
      python generator.py --run runs/generator --synthetic-persons 2770 --synthetic-images 6 --encoder-epochs 25
      continue
    fi
    train=(python embed.py --run "$run" --seed "$seed" "${more[@]}" --no-evaluation)
    if [ "$method" = figure5 ]; then # App. A's step settings, halved as the demo's: steps and 255ths
      for pair in "4 52.5" "10 24" "20 12"; do
        "${train[@]}" --method weak-at --attack-steps "${pair% *}" --attack-alpha "${pair#* }"
      done
      continue
    fi
    case $method in
      doa-*) "${train[@]}" --method doa --candidates "${method#doa-}" ;;
      *) "${train[@]}" --method "$method" ;;
    esac
    attacks=clean,eyeglasses,square,eye_patch,evasion defences=both
    [ "$method" != ours ] || attacks+=,indirect,distal,random_eyeglasses,noise defences=all
    python attacks.py --run "$run" --method "$method" --attacks "$attacks" --defences "$defences"
    python verify.py --run "$run" --method "$method" # the certificate
    case $method in weak-at* | doa-*) # Fig. 3, by networks that never saw a generated image
      [ ! -f "$run/generator.pt" ] || python -m results.figures "$run" "$method" ;;
    esac
  done
  python metrics.py --run "$run"
done

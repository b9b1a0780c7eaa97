#!/usr/bin/env bash
# Every method, attack, table and figure of the paper on the embedded data; what is finished is kept.
#     results/reproduce.sh [method ...]     # ours ours-transfer ours-mixed-all no-at weak-at doa-4 doa-10, figure5
#     SEEDS="0 1 2" results/reproduce.sh ours-mixed-all weak-at
#     RUN=runs/thousand FLAGS="--steps 1000" results/reproduce.sh ours-transfer-masked weak-at doa-10
# After `generator.py --images 2 --epochs 300 --encoder-epochs 100 --run runs/long-0`, else G is the demo's, of all images:
#     RUN=runs/long FLAGS="--images 2 --steps 2000 --lr 1e-3 --lr-end 1e-3" results/reproduce.sh ours-mixed-all weak-at doa-10
# One photograph of each of 300 more persons, whom the demo's G never saw:
#     RUN=runs/photographs-1 OTHERS=300 FLAGS="--synthetic-persons 670 --images 1" results/reproduce.sh ours-transfer weak-at doa-10
# After `generator.py --data folder --root LFW --run runs/lfw-0`:
#     RUN=runs/lfw FLAGS="--data folder --root LFW --steps 3000" results/reproduce.sh ours-transfer weak-at doa-10
# One photograph of each of half of LFW's train persons; G is made of the other half:
#     RUN=runs/lfw-others HALVES=LFW FLAGS="--data folder --root LFW --steps 2000 --images 1" results/reproduce.sh ours weak-at
# Plain commands, each of which goes on after a stop; on two cores start it twice with other methods.
set -euo pipefail
cd "$(dirname "$0")/.."
methods=("$@")
[ $# -gt 0 ] || methods=(ours ours-transfer ours-mixed-all no-at weak-at doa-4 doa-10 figure5)
declare -A flags=([ours]="" [ours-transfer]="--positive transfer" [ours-mixed]="--positive mixed"
  [ours-mixed-all]="--positive mixed --attacked all"
  [ours-transfer-masked]="--positive transfer --masks 4"
  [weak-at-masked]="--method weak-at --attacked erased --masks 4"
  [no-at]="--method no-at" [weak-at]="--method weak-at"
  [doa-4]="--method doa --candidates 4" [doa-10]="--method doa --candidates 10")
table1=clean,eyeglasses,square,eye_patch,evasion,grey_eye_patch,rule,rule_places,rule_one
read -ra more <<<"${FLAGS:-}"
for seed in ${SEEDS:-0}; do
  run=${RUN:-runs/synthetic-demo}-$seed
  [ -z "${OTHERS:-}" ] || [ -f "$run/people.json" ] || python - "$run" "$OTHERS" <<'EOF'
import dataclasses, sys
import data
demo = data.load("synthetic")
split = data.split_persons(demo, None, 40, 30)
count = len(demo.names), len(demo.names) + int(sys.argv[2])
faces = data.load("synthetic", persons=count[1])
data.write_manifest(f"{sys.argv[1]}/people.json", faces, dataclasses.replace(split, train=range(*count)))
EOF
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
    train=(python embed.py --run "$run" --seed "$seed" "${more[@]}" --no-evaluation)
    if [ "$method" = figure5 ]; then # App. A's step settings, halved as the demo's: steps and 255ths
      for pair in "4 52.5" "10 24" "20 12"; do
        "${train[@]}" --method weak-at --attack-steps "${pair% *}" --attack-alpha "${pair#* }"
      done
      continue
    fi
    # shellcheck disable=SC2086
    "${train[@]}" ${flags[$method]}
    attacks=$table1 defences=both
    [ "$method" != ours ] || attacks=all defences=all
    python attacks.py --run "$run" --method "$method" --attacks "$attacks" --defences "$defences"
    case $method in weak-at* | doa-*) # Fig. 3, by networks that never saw a generated image
      [ ! -f "$run/generator.pt" ] || python -m results.figures "$run" "$method" ;;
    esac
  done
  python metrics.py --run "$run"
done

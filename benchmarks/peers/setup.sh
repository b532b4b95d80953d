#!/usr/bin/env bash
# Make the virtual environment of one peer package: setup.sh NAME DIR puts it into DIR/NAME.
# Every peer has its own environment, because they pin each other's dependencies away. PYTHON chooses the interpreter.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo "usage: $0 NAME DIR   (NAME: mergekit, peft, fusion_bench, llmcompressor, gptqmodel, transformers4)" >&2
  exit 2
fi
name=$1 dir=$2

# torch is named in each command, so that pip cannot replace it by another build.
torch=torch==2.13.0
# Installed without what it asks for: optimum would replace the peer's own versions.
alone=()
case $name in
  mergekit) packages=(mergekit==0.1.5) ;;
  peft) packages=(peft==0.21.2) ;;
  fusion_bench) packages=(fusion_bench==0.2.33) ;;
  llmcompressor) packages=(llmcompressor==0.14.0.1) ;;
  gptqmodel) packages=(gptqmodel==7.6.0 transformers==5.24.0) alone=(optimum==2.3.0) ;;
  transformers4) packages=(transformers==4.57.6 compressed-tensors==0.15.0.1 accelerate==1.15.0) ;;
  *)
    echo "$0: there is no peer '$name'; use mergekit, peft, fusion_bench, llmcompressor, gptqmodel or transformers4." >&2
    exit 2
    ;;
esac
# What epmq itself needs; the peers run it from the checkout.
packages+=(pydantic safetensors numpy click rich pyyaml regex)

"${PYTHON:-python3}" -m venv "$dir/$name"
"$dir/$name/bin/python" -m pip install --quiet "$torch"
"$dir/$name/bin/python" -m pip install --quiet "$torch" "${packages[@]}"
if [ ${#alone[@]} -gt 0 ]; then
  "$dir/$name/bin/python" -m pip install --quiet --no-deps "${alone[@]}"
fi
"$dir/$name/bin/python" -m pip list | grep -i -E "^(torch|${packages[0]%%==*})[[:space:]]"

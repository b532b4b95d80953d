#!/usr/bin/env bash
# Make the virtual environment of one peer package: setup.sh NAME DIR puts it into DIR/NAME.
# Every peer has its own environment, because they pin each other's dependencies away. PYTHON chooses the interpreter.
set -euo pipefail

if [ $# -ne 2 ]; then
  echo "usage: $0 NAME DIR   (NAME: mergekit, peft, fusion_bench, llmcompressor, gptqmodel, transformers4, llama_cpp)" >&2
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
  llama_cpp) packages=(llama-cpp-python==0.3.36 gguf==0.19.0 sentencepiece==0.2.2 transformers==5.23.0 compressed-tensors==0.20.0) ;;
  *)
    echo "$0: there is no peer '$name'; use mergekit, peft, fusion_bench, llmcompressor, gptqmodel, transformers4 or" \
      "llama_cpp." >&2
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
if [ "$name" = llama_cpp ]; then
  # Its source holds the converter, which no wheel brings.
  "$dir/$name/bin/python" -m pip download --quiet --no-deps --no-binary :all: --dest "$dir/$name" "${packages[0]}"
  tar -xzf "$dir/$name"/llama_cpp_python-*.tar.gz -C "$dir/$name" --strip-components 2 --wildcards '*/vendor/llama.cpp'
  rm "$dir/$name"/llama_cpp_python-*.tar.gz
fi
"$dir/$name/bin/python" -m pip list | grep -i -E "^(torch|${packages[0]%%==*})[[:space:]]"

#!/bin/sh
# The Vercel AI SDK against a running server:   sh tests/clients/ai_sdk.sh http://127.0.0.1:8008 MODEL
# MODEL is an id of /v1/models. Needs node 18 or later and npm; installs into a temporary folder, these versions:
set -eu
here=$(cd "$(dirname "$0")" && pwd)
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cp "$here/ai_sdk.mjs" "$folder"
(cd "$folder" && npm install --silent --no-save --no-audit --no-fund --ignore-scripts \
    ai@6.0.325 @ai-sdk/openai-compatible@2.0.92 zod@4.6.7)
node "$folder/ai_sdk.mjs" "$@"

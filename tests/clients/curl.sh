#!/bin/sh
# curl against a running server:   sh tests/clients/curl.sh http://127.0.0.1:8008 MODEL
# MODEL is an id of /v1/models. Where the server asks for a key, add   -H "Authorization: Bearer $KEY"   to each.
set -eu
url=$1
model=$2

echo "# the models"
curl -sS --fail "$url/v1/models"

echo; echo "# a reply"
curl -sS --fail "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "'"$model"'",
  "messages": [{"role": "user", "content": "What is a token?"}],
  "max_tokens": 24, "temperature": 0.7, "seed": 5
}'

echo; echo "# the same reply, token by token (-N: curl holds nothing back)"
curl -sS --fail -N "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "'"$model"'",
  "messages": [{"role": "user", "content": "What is a token?"}],
  "max_tokens": 24, "temperature": 0.7, "seed": 5,
  "stream": true, "stream_options": {"include_usage": true}
}'

echo "# text as it is, continued; with the log-probability of every token of the prompt"
curl -sS --fail "$url/v1/completions" -H 'Content-Type: application/json' -d '{
  "model": "'"$model"'",
  "prompt": "What is a token?", "max_tokens": 4, "temperature": 0, "echo": true, "logprobs": 1
}'

echo; echo "# what goes wrong is told as JSON, with a status of its own"
curl -sS -w '\n%{http_code}\n' "$url/v1/chat/completions" -H 'Content-Type: application/json' -d '{
  "model": "no-such-model", "messages": [{"role": "user", "content": "hi"}]
}'

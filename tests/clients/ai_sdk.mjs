// What an application built on the Vercel AI SDK asks of an OpenAI-compatible server. ai_sdk.sh installs and starts it.
//
//     node ai_sdk.mjs URL MODEL
//
// Prints a line a check, and exits 1 where one fails. Works with any model; the tool round trip is followed to its end
// where the model calls the tool it is offered, and where its chat format has no tools, that must be said as an error.
import assert from 'node:assert/strict';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { APICallError, generateText, jsonSchema, stepCountIs, streamText, tool } from 'ai';

const [url, id] = process.argv.slice(2);
const provider = createOpenAICompatible({ name: 'sftflow', baseURL: `${url}/v1`, includeUsage: true });
const model = provider(id);
const draw = { model, prompt: 'What is a token?', temperature: 1, seed: 5, maxRetries: 0 };
const greedy = { ...draw, temperature: 0 };
globalThis.AI_SDK_LOG_WARNINGS = false;

let failed = 0;
async function check(name, run) {
  try {
    console.log(`ok      ${name}: ${(await run()) ?? ''}`);
  } catch (error) {
    failed += 1;
    console.log(`FAILED  ${name}: ${error.stack}`);
  }
}

async function refused(run) {
  try {
    await run();
  } catch (error) {
    return error;
  }
  return assert.fail('nothing was refused');
}

// The server's own count of replies that run or wait.
async function running() {
  const response = await fetch(`${url}/metrics`);
  assert.ok(response.ok, "no /metrics");
  const found = (await response.text()).matchAll(/^sftflow_replies_(?:running|waiting)\{.*\} (\d+)$/gm);
  return [...found].reduce((sum, [, n]) => sum + Number(n), 0);
}

await check('generateText', async () => {
  const { text, usage, finishReason, response } = await generateText({ ...draw, maxOutputTokens: 16 });
  assert.ok(usage.inputTokens > 0 && usage.outputTokens > 0 && usage.outputTokens <= 16);
  assert.equal(usage.totalTokens, usage.inputTokens + usage.outputTokens);
  assert.ok(['stop', 'length'].includes(finishReason));
  assert.equal(response.modelId, id);
  return JSON.stringify({ text, finishReason, out: usage.outputTokens });
});

await check('streamText joined is generateText, for one seed', async () => {
  const plain = await generateText({ ...draw, maxOutputTokens: 24 });
  const streamed = streamText({ ...draw, maxOutputTokens: 24 });
  const pieces = [];
  for await (const piece of streamed.textStream) pieces.push(piece);
  assert.equal(pieces.join(''), plain.text);
  assert.equal(await streamed.finishReason, plain.finishReason);
  const { inputTokens, outputTokens, totalTokens } = await streamed.usage;
  const { inputTokens: a, outputTokens: b, totalTokens: c } = plain.usage;
  assert.deepEqual([inputTokens, outputTokens, totalTokens], [a, b, c]);
  return `${pieces.length} pieces`;
});

await check('finish reason length', async () => {
  const { usage, finishReason } = await generateText({ ...greedy, maxOutputTokens: 2 });
  assert.equal(finishReason, 'length');
  assert.equal(usage.outputTokens, 2);
});

await check('finish reason stop, and what stands before the stop sequence', async () => {
  const { text } = await generateText({ ...greedy, maxOutputTokens: 24 });
  assert.ok(text.length > 3, JSON.stringify(text));
  const at = Math.floor(text.length / 2);
  const stop = text.slice(at, at + 2);
  const cut = await generateText({ ...greedy, maxOutputTokens: 24, stopSequences: [stop] });
  assert.equal(cut.finishReason, 'stop');
  assert.equal(cut.text, text.slice(0, text.indexOf(stop)));
  const streamed = streamText({ ...greedy, maxOutputTokens: 24, stopSequences: [stop] });
  assert.equal(await streamed.text, cut.text);
  return JSON.stringify(stop);
});

await check('a system prompt and a history', async () => {
  const { usage } = await generateText({
    model, temperature: 0, maxRetries: 0, maxOutputTokens: 4,
    system: 'Be brief.',
    messages: [
      { role: 'user', content: 'Hello.' },
      { role: 'assistant', content: 'Hello!' },
      { role: 'user', content: [{ type: 'text', text: 'What is a token?' }] },
    ],
  });
  const short = await generateText({ ...greedy, maxOutputTokens: 4 });
  assert.ok(usage.inputTokens > short.usage.inputTokens);
  return `${usage.inputTokens} tokens of prompt, ${short.usage.inputTokens} without`;
});

await check('an unknown model is an error', async () => {
  const error = await refused(() => generateText({ ...draw, model: provider('no-such-model') }));
  assert.ok(APICallError.isInstance(error), error);
  assert.equal(error.statusCode, 404);
  assert.equal(JSON.parse(error.responseBody).error.code, 'model_not_found');
  return error.message;
});

await check('an unknown model is an error of the stream', async () => {
  let seen;
  const streamed = streamText({ ...draw, model: provider('no-such-model'), onError: ({ error }) => (seen = error) });
  await streamed.consumeStream();
  assert.ok(APICallError.isInstance(seen), seen);
  assert.equal(seen.statusCode, 404);
});

await check('a prompt that is too long is an error', async () => {
  const error = await refused(() => generateText({ ...draw, prompt: 'one two three '.repeat(40_000) }));
  assert.ok(APICallError.isInstance(error), error);
  assert.equal(error.statusCode, 400);
  assert.equal(JSON.parse(error.responseBody).error.code, 'context_length_exceeded');
  return error.message;
});

const calls = [];
const tools = {
  weather: tool({
    description: 'The weather in a city.',
    inputSchema: jsonSchema({ type: 'object', properties: { city: { type: 'string' } }, required: ['city'] }),
    execute: async ({ city }) => {
      calls.push(city);
      return `sunny in ${city}`;
    },
  }),
};
const weather = { model, tools, temperature: 0, maxRetries: 0, maxOutputTokens: 64, stopWhen: stepCountIs(3),
                  prompt: 'What is the weather in Paris?' };

await check('a tool round trip', async () => {
  let first;
  try {
    first = await generateText(weather);
  } catch (error) {
    if (!APICallError.isInstance(error) || error.statusCode !== 400) throw error;
    assert.equal(JSON.parse(error.responseBody).error.param, 'tools');
    return `the format has none, and the server says so: ${error.message}`;
  }
  if (!calls.length) return `offered, and not called: ${JSON.stringify(first.text)}`;
  assert.deepEqual(calls, ['Paris']);
  assert.equal(first.steps.length, 2);
  assert.equal(first.steps[0].finishReason, 'tool-calls');
  assert.equal(first.finishReason, 'stop');
  const streamed = streamText(weather);
  assert.equal(await streamed.text, first.text);
  assert.deepEqual(calls, ['Paris', 'Paris']);
  const [step] = await streamed.steps;
  assert.deepEqual(step.toolCalls.map((c) => [c.toolName, c.input]), [['weather', { city: 'Paris' }]]);
  return JSON.stringify(first.text);
});

await check('abort in the middle of a stream', async () => {
  const leaving = new AbortController();
  const streamed = streamText({
    ...draw, abortSignal: leaving.signal, maxOutputTokens: 3000, onError: () => {},
    providerOptions: { sftflow: { ignore_eos: true } },
  });
  let pieces = 0;
  let aborted = false;
  for await (const part of streamed.fullStream) {
    if (part.type === 'text-delta' && ++pieces === 3) leaving.abort();
    aborted ||= part.type === 'abort';
  }
  assert.ok(aborted && pieces < 100, `${pieces} pieces, aborted: ${aborted}`);
  const began = Date.now();
  while (await running()) {
    assert.ok(Date.now() - began < 3000, 'the server still computes the reply');
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  await generateText({ ...draw, maxOutputTokens: 2 });
  return `after ${pieces} pieces; nothing runs ${Date.now() - began} ms later`;
});

console.log(failed ? `${failed} failed` : 'all good');
process.exit(failed ? 1 : 0);

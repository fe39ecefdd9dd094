// The npm package openai on a live server: `node checks.mjs BASE_URL KEY` exits with 1 at the first check that fails.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0, timeout: 60_000 });
const capital = [{ role: "user", content: "What is the capital of France?" }];
const forecast = [{ role: "user", content: "What is the weather in Paris?" }];
const greedy = { model: "demo", temperature: 0, max_tokens: 80 };
const answers = { model: "demo", temperature: 0, max_output_tokens: 80 };
const city = {
  type: "object", properties: { city: { type: "string", enum: ["Paris", "Rome"] } }, required: ["city"],
  additionalProperties: false,
};
const weather = { type: "function", function: { name: "get_weather", description: "Weather", parameters: city } };
const Size = z.object({ unit: z.enum(["cm", "inch"]), large: z.boolean() });

const checks = {
  async models() {
    const ids = [];
    for await (const model of client.models.list()) ids.push(model.id);
    assert.deepEqual(ids, ["demo"]);
  },

  async chatWholeAndStreamed() {
    const whole = (await client.chat.completions.create({ ...greedy, messages: capital })).choices[0];
    assert.match(whole.message.content, /Paris/);
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...greedy, messages: capital, stream: true })) {
      text += chunk.choices[0].delta.content;
    }
    assert.equal(text, whole.message.content);
    const helper = client.chat.completions.stream({ ...greedy, messages: capital, logprobs: true, top_logprobs: 2 });
    const final = await helper.finalChatCompletion();
    assert.equal(final.choices[0].message.content, text);
    assert.ok(final.choices[0].logprobs.content.every((token) => token.top_logprobs.length === 2));
  },

  async completions() {
    const done = await client.completions.create({ ...greedy, max_tokens: 4, prompt: ["The sky", "A dog"] });
    assert.equal(done.choices.length, 2);
  },

  async toolsAndTheAnswerToTheirResult() {
    for (const tool_choice of ["auto", "required", { type: "function", function: { name: "get_weather" } }]) {
      const fields = { ...greedy, messages: forecast, tools: [weather], tool_choice, parallel_tool_calls: false };
      const { message } = (await client.chat.completions.create(fields)).choices[0];
      const [call] = message.tool_calls;
      assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
      const streamed = await client.chat.completions.stream(fields).finalChatCompletion();
      assert.equal(streamed.choices[0].message.tool_calls[0].function.arguments, call.function.arguments);
      const result = { role: "tool", tool_call_id: call.id, content: '{"weather": "sunny"}' };
      const history = [...forecast, message, result];
      const answer = await client.chat.completions.create({ ...greedy, messages: history, tools: [weather] });
      assert.ok(answer.choices[0].message.content);
    }
  },

  async runTools() {
    const asked = [];
    const call = { ...weather.function, parse: JSON.parse, function: (args) => (asked.push(args), "sunny") };
    const runner = client.chat.completions.runTools({
      ...greedy, messages: forecast, tools: [{ type: "function", function: call }],
    });
    assert.ok(await runner.finalContent());
    assert.deepEqual(asked[0], { city: "Paris" });
  },

  async structuredOutput() {
    const response_format = zodResponseFormat(Size, "size");
    const parsed = await client.chat.completions.parse({ ...greedy, messages: capital, response_format });
    Size.parse(parsed.choices[0].message.parsed);
    const text = { format: zodTextFormat(Size, "size") };
    Size.parse((await client.responses.parse({ ...answers, input: "A size?", text })).output_parsed);
  },

  async responses() {
    const input = capital[0].content;
    const whole = await client.responses.create({ ...answers, input });
    assert.match(whole.output_text, /Paris/);
    let text = "";
    for await (const event of await client.responses.create({ ...answers, input, stream: true })) {
      if (event.type === "response.output_text.delta") text += event.delta;
    }
    assert.equal(text, whole.output_text);
    assert.equal((await client.responses.stream({ ...answers, input }).finalResponse()).output_text, text);
  },

  async errors() {
    const cases = [
      [OpenAI.BadRequestError, { temperature: 3 }], [OpenAI.NotFoundError, { model: "nobody" }],
      [OpenAI.RateLimitError, { n: 20, temperature: 1 }],
    ];
    for (const [kind, fields] of cases) {
      await assert.rejects(client.chat.completions.create({ ...greedy, messages: capital, ...fields }), kind);
    }
    const stranger = client.withOptions({ apiKey: "wrong" });
    await assert.rejects(stranger.chat.completions.create({ ...greedy, messages: capital }), OpenAI.AuthenticationError);
    await assert.rejects(client.embeddings.create({ model: "demo", input: "x" }), /does not support Embeddings API/);
    await assert.rejects(client.completions.create({ ...greedy, prompt: "x".repeat(300_000) }), { status: 413 });
  },

  async aborts() {
    const endless = { model: "demo", messages: capital, max_tokens: 1900, ignore_eos: true };
    for (let i = 0; i < 20; i++) {
      const stream = await client.chat.completions.create({ ...endless, stream: true });
      for await (const chunk of stream) if (chunk) break;
    }
    await assert.rejects(client.chat.completions.create(endless, { timeout: 50 }), OpenAI.APIConnectionTimeoutError);
    const controller = new AbortController();
    const asked = client.chat.completions.create(endless, { signal: controller.signal });
    controller.abort();
    await assert.rejects(asked, OpenAI.APIUserAbortError);
    assert.match((await client.chat.completions.create({ ...greedy, messages: capital })).choices[0].message.content, /Paris/);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    console.error(name, error);
    process.exit(1);
  }
}
console.log(`${Object.keys(checks).length} checks passed`);

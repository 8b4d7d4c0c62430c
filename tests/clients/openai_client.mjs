// The `openai` package of npm, asked for what test_openai_node.py expects; prints JSON.
import { createRequire } from "node:module";

const [packages, baseURL, apiKey, texts, slowURL] = process.argv.slice(2);
const OpenAI = createRequire(`${packages}/package.json`)("openai");
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const input = JSON.parse(texts);
const model = "minilm";

async function failure(promise) {
  try {
    await promise;
  } catch (error) {
    const { name, status, code, param, message } = error;
    return { name: error.constructor.name, status, code, param, message };
  }
  return null;
}

const create = (body, with_ = client) => with_.embeddings.create({ model, input, ...body });
const numbers = (answer) => answer.data.map((one) => Array.from(one.embedding));
const decoded = await create({}); // base64 on the wire, decoded by the client
const plain = await create({ encoding_format: "float" });
const query = await create({ input_type: "query" });
const many = await create({ input: Array.from({ length: 2048 }, (_, number) => `number ${number}`) });
const wrongKey = new OpenAI({ baseURL, apiKey: "wrong", maxRetries: 0 });
const listed = [];
for await (const one of client.models.list()) listed.push(one.id);

// The first of two requests that do not fit together makes the other one wait and try again.
const slow = new OpenAI({ baseURL: slowURL, apiKey: "unused", maxRetries: 5 });
const large = Array.from({ length: 250 }, (_, number) => String(number)).join(" ");
const both = [1, 2].map(() => slow.embeddings.create({ model: "echo", input: large }));

console.log(
  JSON.stringify({
    decoded: numbers(decoded),
    plain: numbers(plain),
    query: numbers(query),
    usage: decoded.usage,
    indices: many.data.map((one) => one.index),
    last: Array.from(many.data[2047].embedding),
    short: numbers(await create({ dimensions: 128 })),
    listed,
    retried: (await Promise.all(both)).map((one) => one.usage.prompt_tokens),
    failures: {
      empty: await failure(create({ input: "" })),
      model: await failure(create({ model: "gpt" })),
      key: await failure(create({}, wrongKey)),
    },
  }),
);

// Asks the routes of the service that it came from. Texts get into the page as text alone.

const KEY = "reasonembed.key"; // of sessionStorage
const PAGE = 1000; // benchmark queries a request
const LISTED = 50; // of them that are shown at once
const SNIPPET = 400; // characters of a document before it is opened
const OWN = "own instruction"; // of the task picker; no task has a blank in its name

// The columns in their order. Each asks for its own results, so that a slow one holds none up.
const COLUMNS = {
  bm25: { name: "BM25", kind: "bm25", digits: 2 },
  dense: { name: "Dense", kind: "dense", digits: 3 },
  rewritten: { name: "Rewritten q′", kind: null, rewrite: true, digits: 3 },
  hybrid: { name: "Hybrid", kind: "hybrid", digits: 4 },
};

const byId = (id) => document.getElementById(id);
const form = byId("search");
const fields = {
  query: byId("query"),
  index: byId("index"),
  task: byId("task"),
  instruction: byId("instruction"),
  hits: byId("hits"),
  excluded: byId("excluded"),
};

let info = null; // GET /info
let indexes = []; // GET /v1/indexes
let picked = null; // the benchmark query whose gold is marked
let columns = []; // what is on the page: {key, element, hits}
let running = new AbortController(); // of the newest search
const benchmarks = new Map(); // queries by index, as far as they were read

// Elements and words.

function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children.filter((child) => child !== null && child !== ""));
  return element;
}

const count = (number, noun, nouns = `${noun}s`) => `${number.toLocaleString("en")} ${number === 1 ? noun : nouns}`;
const milliseconds = (ms) => `${ms < 10 ? ms.toFixed(1) : Math.round(ms)} ms`;
const current = () => indexes.find((one) => one.name === fields.index.value);
const excludedIds = () => fields.excluded.value.split("\n").map((line) => line.trim()).filter(Boolean);

// The API.

class Refusal extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function ask(path, { body, signal } = {}) {
  const headers = {};
  const key = sessionStorage.getItem(KEY);
  if (key) headers["X-API-Key"] = key;
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    const method = body ? "POST" : "GET";
    response = await fetch(path, { method, headers, signal, body: body && JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The service cannot be reached. Is it running?", 0);
  }
  const answer = await response.json().catch(() => null);
  if (response.ok && answer !== null) return answer;
  if (response.status === 401) askForKey();
  throw new Refusal(inWords(response, answer), response.status);
}

function inWords(response, answer) {
  const said = answer?.error?.message ?? `it answered ${response.status} ${response.statusText}`;
  const wait = response.headers.get("Retry-After");
  const begin = {
    401: "Not let in",
    408: "Too slow",
    429: "The service is busy",
    500: "The service failed",
    503: "The service is not ready",
  };
  const again = wait ? ` (Try again in ${count(Number(wait), "second")}.)` : "";
  return `${begin[response.status] ?? "Refused"}: ${said}.${again}`;
}

// The key.

function askForKey() {
  if (!byId("key").hidden) return;
  byId("key").hidden = false;
  byId("key-field").focus();
}

byId("key").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem(KEY, byId("key-field").value);
  byId("key-field").value = "";
  byId("key").hidden = true;
  if (info === null) start();
  else if (!form.hidden) search();
});

// What is served.

async function start() {
  byId("problem").hidden = true;
  try {
    info = await ask("info");
    indexes = (await ask("v1/indexes")).data;
  } catch (error) {
    info = null;
    byId("model").textContent = "";
    const again = make("button", { type: "button", onclick: start }, "Try again");
    byId("problem").replaceChildren(error.message, again);
    byId("problem").hidden = false;
    return;
  }
  describe();
  byId("comparison").hidden = byId("about").hidden = false;
  if (indexes.length === 0) {
    byId("comparison").open = byId("about").open = true;
    say("No index is loaded, so there is nothing to search in; start the service with --index DIR.");
    return;
  }
  form.hidden = false;
  byId("no-rewriting").hidden = info.can_rewrite;
  fields.hits.max = Math.min(100, info.limits.max_top_k);
  fields.index.replaceChildren(...indexes.map((one) => make("option", { value: one.name }, one.name)));
  await restore();
}

function describe() {
  const { model, limits, speed } = info;
  byId("model").textContent =
    `${model.name}, ${model.dimension} dimensions` +
    (indexes.length ? `, ${indexes.map((one) => `${one.name}: ${count(one.num_documents, "document")}`).join("; ")}` : "");
  const number = (value) => value.toLocaleString("en");
  const facts = {
    Model: [model.name, ...model.aliases].join(", "),
    "Made on": info.backend,
    "Length of a vector": model.dimensions.map(number).join(", "),
    "Longest text": `query ${count(model.max_query_tokens, "token")}, document ${count(model.max_document_tokens, "token")}`,
    "Instruction of queries": model.default_instruction ?? "none: this model takes none",
    Fingerprint: model.fingerprint,
    "Vectors checked": model.is_checked ? "golden ids and vectors agreed at the start" : "no golden vectors lie beside the weights",
    Speed: speed.tokens_per_s ? `${number(Math.round(speed.tokens_per_s))} tokens a second` : "not measured yet",
    "A request holds": `${count(limits.max_inputs, "input")}, ${count(limits.max_request_tokens, "token")}`,
    "Query rewriting": info.can_rewrite ? "yes" : "no",
    "Graded reranking": info.can_grade ? "yes" : "no",
    Version: `${info.version}, interface ${info.api_version}`,
  };
  for (const one of indexes) {
    const queries = one.num_queries ? `, ${count(one.num_queries, "benchmark query", "benchmark queries")}` : "";
    facts[`Index ${one.name}`] = `${count(one.num_documents, "document")}, ${one.kinds.join(", ")}${queries}`;
  }
  const rows = Object.entries(facts).flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, String(value))]);
  byId("about").querySelector("dl").replaceChildren(...rows);
  const takesInstruction = model.default_instruction !== null;
  byId("comparison-instruction").hidden = !takesInstruction;
  byId("comparison").querySelector("form").elements.instruction.value = model.default_instruction ?? "";
}

const say = (text) => { byId("status").textContent = text; };

// The form, whose whole state stands in the address.

function offerTasks() {
  const before = fields.task.value;
  const options = [["", `of the index (${current().task})`], ...info.tasks.map((name) => [name, name])];
  if (info.model.default_instruction !== null) options.push([OWN, "my own instruction …"]);
  fields.task.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  fields.task.value = options.some(([value]) => value === before) ? before : "";
  const isUseless = info.model.default_instruction === null && !info.can_rewrite;
  fields.task.disabled = isUseless;
  showTask();
}

function showTask() {
  const { model, instructions } = info;
  const task = fields.task.value;
  byId("own").hidden = task !== OWN;
  const instruction = task === "" ? current().instruction ?? model.default_instruction : instructions[task];
  let note = task === OWN ? "" : `Instruction: ${instruction}`;
  if (model.default_instruction === null) {
    note = `${model.name} takes no instruction: ` + (info.can_rewrite ? "the task is told to the rewriting LLM alone." : "a task would change nothing.");
  }
  byId("task-note").textContent = note;
}

function offerColumns(wanted) {
  const kinds = current().kinds;
  const boxes = Object.entries(COLUMNS)
    .filter(([, column]) => !column.rewrite || info.can_rewrite)
    .map(([key, column]) => {
      const isThere = column.rewrite || kinds.includes(column.kind);
      const box = make("input", { type: "checkbox", name: "shown", value: key, disabled: !isThere });
      box.checked = isThere && wanted.includes(key);
      return make("label", isThere ? {} : { title: "the index cannot be searched so" }, box, column.name);
    });
  byId("shown").replaceChildren(byId("shown").querySelector("legend"), ...boxes);
  if (chosenColumns().length === 0) {
    for (const box of byId("shown").querySelectorAll("input:enabled")) box.checked = true;
  }
}

const chosenColumns = () => Array.from(byId("shown").querySelectorAll("input:checked"), (box) => box.value);
const defaultColumns = () => ["bm25", "dense", "rewritten"];

function useIndex(wanted) {
  offerTasks();
  offerColumns(wanted);
  const number = current().num_queries;
  byId("benchmark").hidden = number === 0;
  byId("benchmark").open = false;
  byId("benchmark").querySelector("summary").textContent = `Benchmark queries (${number.toLocaleString("en")})`;
}

function countExcluded() {
  const number = excludedIds().length;
  byId("num-excluded").textContent = number ? `(${number})` : "";
}

function state() {
  const found = new URLSearchParams();
  found.set("index", fields.index.value);
  if (picked) found.set("benchmark", picked.id);
  if (fields.query.value !== picked?.query) found.set("q", fields.query.value);
  if (fields.task.value === OWN) found.set("instruction", fields.instruction.value);
  else if (fields.task.value) found.set("task", fields.task.value);
  const excluded = excludedIds();
  if (excluded.join("\n") !== (picked?.excluded_ids ?? []).join("\n")) found.set("excluded", excluded.join("\n"));
  if (fields.hits.value !== "10") found.set("hits", fields.hits.value);
  found.set("show", chosenColumns().join(" "));
  return `#${found}`;
}

async function restore() {
  const given = new URLSearchParams(location.hash.slice(1));
  fields.index.value = given.get("index") ?? "";
  if (!current()) fields.index.value = indexes[0].name;
  const instruction = given.get("instruction");
  useIndex(given.get("show")?.split(" ") ?? defaultColumns());
  fields.task.value = instruction === null ? given.get("task") ?? "" : OWN;
  if (fields.task.selectedIndex < 0) fields.task.value = "";
  fields.instruction.value = instruction ?? "";
  fields.hits.value = given.get("hits") ?? "10";
  const { hash } = location;
  const found = given.has("benchmark") ? await findQuery(given.get("benchmark")) : null;
  if (location.hash !== hash) return; // another state was asked for meanwhile
  picked = found;
  fields.query.value = given.get("q") ?? picked?.query ?? "";
  fields.excluded.value = given.get("excluded") ?? (picked?.excluded_ids ?? []).join("\n");
  countExcluded();
  showTask();
  showPicked();
  if (fields.query.value.trim()) {
    await search({ isNew: false });
    return;
  }
  running.abort();
  columns = [];
  byId("columns").replaceChildren();
  fields.query.focus();
}

// Searches.

async function search({ isNew = true } = {}) {
  const query = fields.query.value;
  if (!query.trim()) {
    say("The query is empty.");
    fields.query.focus();
    return;
  }
  if (!form.reportValidity()) return;
  running.abort(); // the service stops working for a request that nobody waits for
  const mine = (running = new AbortController());
  if (isNew && state() !== location.hash) history.pushState(null, "", state());
  document.title = `${shortened(query.trim(), 60)} – ReasonEmbed`;
  showPicked();
  const keys = chosenColumns();
  columns = keys.map((key) => columns.find((one) => one.key === key) ?? newColumn(key));
  byId("columns").replaceChildren(...columns.map((one) => one.element));
  say(keys.length ? "Searching …" : "Choose at least one column.");
  const request = requestOf(query);
  await Promise.all(columns.map((column) => fill(column, request, mine.signal)));
  if (!mine.signal.aborted && keys.length) say(columns.map(summary).join("; "));
}

function requestOf(query) {
  const body = {
    index: fields.index.value,
    query,
    top_k: Number(fields.hits.value),
    return_documents: true,
    truncate: "end",
    excluded_ids: excludedIds(),
  };
  const instruction = fields.instruction.value;
  if (fields.task.value === OWN) {
    if (instruction.trim()) body.instruction = instruction;
  } else if (fields.task.value) body.prompt_name = fields.task.value;
  return body;
}

function newColumn(key) {
  const heading = make("h2", { id: `column-${key}` }, COLUMNS[key].name);
  const notes = make("div");
  const element = make("section", { className: `column ${key}`, "aria-labelledby": heading.id });
  element.append(make("header", {}, heading, notes), make("p", { className: "muted small" }, "Searching …"));
  return { key, element, notes, hits: [] };
}

async function fill(column, request, signal) {
  const { kind, rewrite } = COLUMNS[column.key];
  const body = { ...request, ...(kind && { kind }), ...(rewrite && { rewrite }) };
  column.element.setAttribute("aria-busy", "true");
  let answer;
  try {
    answer = await ask("v1/search", { body, signal });
  } catch (error) {
    if (signal.aborted) return; // a newer search writes here
    column.hits = [];
    column.failure = error.message;
    column.notes.replaceChildren();
    replaceBody(column, make("p", { className: "problem small" }, error.message));
  }
  if (signal.aborted) return;
  if (answer) {
    column.failure = null;
    show(column, answer, request);
  }
  column.element.setAttribute("aria-busy", "false");
  relate();
}

function replaceBody(column, ...elements) {
  column.element.replaceChildren(column.element.querySelector("header"), ...elements);
}

function show(column, answer, request) {
  const [found] = answer.data;
  column.hits = found.hits;
  const notes = [make("p", { className: "small muted" }, timesOf(answer.timings_ms))];
  if (picked) notes.push(make("p", { className: "small gain" }, gainOf(found.hits, request.top_k)));
  if (found.unknown_excluded_ids) notes.push(note(`${count(found.unknown_excluded_ids, "excluded id")} of no document here`));
  if (answer.usage.truncated_inputs.length) {
    const what = found.rewritten_query ? "What was searched for" : "The query";
    notes.push(note(`${what} is longer than the model takes; its end was cut.`));
  }
  column.notes.replaceChildren(...notes);
  const rows = found.hits.map((hit) => newHit(hit, COLUMNS[column.key]));
  const list = make("ol", {}, ...rows);
  if (rows.length) rows[0].querySelector("summary").tabIndex = 0;
  replaceBody(
    column,
    ...(found.rewritten_query === undefined ? [] : [rewritingOf(found.rewritten_query)]),
    rows.length ? list : make("p", { className: "muted small" }, "Nothing was found."),
    ...missedOf(found.hits),
  );
}

const note = (text) => make("p", { className: "small muted" }, text);

function timesOf(timings) {
  const names = { rewrite: "rewriting", tokenize: "tokenising", encode: "embedding", search: "search" };
  return Object.entries(names)
    .filter(([part]) => timings[part] > 0)
    .map(([part, name]) => `${name} ${milliseconds(timings[part])}`)
    .join(" · ");
}

function rewritingOf(rewritten) {
  if (rewritten === null) {
    return make("p", { className: "small bad" }, "The LLM wrote no q′; the query itself was searched for.");
  }
  return make(
    "details",
    { className: "rewriting" },
    make("summary", {}, "What was searched for"),
    make("blockquote", { dir: "auto" }, rewritten),
  );
}

function newHit(hit, { digits }) {
  const { title, text } = hit.document;
  const rest = title && text.startsWith(`${title}\n`) ? text.slice(title.length) : text;
  const gold = picked?.gold.get(hit.id);
  const badge = gold ? `★ gold${gold > 1 ? ` ${gold}` : ""}` : "";
  const summaryOf = make(
    "summary",
    { tabIndex: -1 },
    make("span", { className: "rank" }, String(hit.rank)),
    make("span", { className: "title", dir: "auto" }, title || hit.id),
    make("span", { className: "score" }, hit.score.toFixed(digits)),
    make("span", { className: "line" }, make("span", { className: "badge" }, badge), " ", make("span", { className: "also" })),
    make("span", { className: "line snippet", dir: "auto" }, shortened(rest.trim())),
  );
  const whole = make("div", { className: "whole" });
  const details = make("details", {}, summaryOf, whole);
  // Whole texts are written when they are asked for: a hundred long ones would slow the page.
  details.addEventListener("toggle", () => whole.childElementCount || whole.append(...wholeOf(hit)));
  const row = make("li", { className: gold ? "hit gold" : "hit" }, details);
  row.dataset.id = hit.id;
  return row;
}

function shortened(text, length = SNIPPET) {
  const begin = Array.from(text.slice(0, 2 * length)).slice(0, length).join(""); // whole characters
  return begin.length < text.length ? `${begin.trimEnd()} …` : begin;
}

function addressOf(docId) {
  return `v1/documents/${encodeURIComponent(fields.index.value)}/${encodeURIComponent(docId)}`;
}

const linkTo = (docId) => make("a", { href: addressOf(docId), target: "_blank", rel: "noreferrer" }, docId);

function wholeOf(hit) {
  const exclude = make("button", { type: "button" }, "Exclude it");
  exclude.addEventListener("click", () => {
    fields.excluded.value = [...excludedIds(), hit.id].join("\n");
    countExcluded();
    search();
    fields.query.focus();
  });
  return [
    make("p", { className: "actions" }, linkTo(hit.id), exclude),
    make("blockquote", { dir: "auto" }, hit.document.text),
  ];
}

// Gold.

// nDCG@10 with linear gains, as trec_eval has it.
function ndcg(hits, gold) {
  const discounted = (gains) => gains.slice(0, 10).reduce((sum, gain, place) => sum + gain / Math.log2(place + 2), 0);
  const ideal = discounted([...gold.values()].sort((a, b) => b - a));
  return ideal ? discounted(hits.map((hit) => gold.get(hit.id) ?? 0)) / ideal : 0;
}

const goldRanks = (hits) => hits.filter((hit) => picked.gold.has(hit.id)).map((hit) => hit.rank);

function gainOf(hits, k) {
  const ranks = goldRanks(hits);
  const where = ranks.length ? `gold at ${ranks.length === 1 ? "rank" : "ranks"} ${ranks.join(", ")}` : `no gold among the first ${k}`;
  return k >= 10 ? `nDCG@10 ${ndcg(hits, picked.gold).toFixed(3)} · ${where}` : where;
}

function missedOf(hits) {
  const shown = new Set(hits.map((hit) => hit.id));
  const missed = [...(picked?.gold.keys() ?? [])].filter((docId) => !shown.has(docId));
  if (missed.length === 0) return [];
  const links = missed.slice(0, 20).flatMap((docId) => [" ", linkTo(docId)]);
  const more = missed.length > 20 ? ` and ${missed.length - 20} more` : "";
  return [make("p", { className: "small muted" }, "★ Gold that is not here:", ...links, more)];
}

function summary(column) {
  const { name } = COLUMNS[column.key];
  if (column.failure) return `${name}: ${column.failure}`;
  const gold = picked ? `, ${goldRanks(column.hits).length} gold` : "";
  return `${name}: ${count(column.hits.length, "hit")}${gold}`;
}

// Documents that several columns found.

function relate() {
  for (const column of columns) {
    const others = columns.filter((one) => one !== column && one.hits.length);
    for (const row of others.length ? column.element.querySelectorAll(".hit") : []) {
      const ranks = others.flatMap((one) => {
        const hit = one.hits.find((other) => other.id === row.dataset.id);
        return hit ? [`${COLUMNS[one.key].name} ${hit.rank}`] : [];
      });
      row.querySelector(".also").textContent = ranks.length ? `also ${ranks.join(", ")}` : "only here";
    }
  }
}

function mark(target) {
  const docId = target?.closest?.(".hit")?.dataset.id;
  for (const row of byId("columns").querySelectorAll(".hit")) {
    row.classList.toggle("same", docId !== undefined && row.dataset.id === docId);
  }
}

for (const name of ["pointerover", "focusin"]) byId("columns").addEventListener(name, (event) => mark(event.target));
for (const name of ["pointerleave", "focusout"]) byId("columns").addEventListener(name, () => mark(null));

// Keys.

function moveTo(summaryOf) {
  if (!summaryOf) return;
  const list = summaryOf.closest("ol");
  for (const one of list.querySelectorAll("summary")) one.tabIndex = one === summaryOf ? 0 : -1;
  summaryOf.focus();
  summaryOf.scrollIntoView({ block: "nearest" });
}

const summariesOf = (column) => [...column.element.querySelectorAll(".hit summary")];

byId("columns").addEventListener("keydown", (event) => {
  if (!event.target.matches(".hit summary") || event.ctrlKey || event.altKey || event.metaKey) return;
  const filled = columns.filter((one) => one.hits.length);
  const here = filled.findIndex((one) => one.element.contains(event.target));
  const rows = summariesOf(filled[here]);
  const place = rows.indexOf(event.target);
  const beside = (step) => {
    const others = filled[here + step] ? summariesOf(filled[here + step]) : [];
    return others[Math.min(place, others.length - 1)];
  };
  const moves = {
    ArrowDown: () => rows[place + 1],
    ArrowUp: () => rows[place - 1] ?? fields.query,
    ArrowLeft: () => beside(-1),
    ArrowRight: () => beside(1),
    Home: () => rows[0],
    End: () => rows.at(-1),
  };
  if (!moves[event.key]) return;
  event.preventDefault();
  const next = moves[event.key]();
  if (next === fields.query) next.focus();
  else moveTo(next);
});

fields.query.addEventListener("keydown", (event) => {
  if (event.isComposing) return; // Enter chooses a character there
  if (event.key === "Enter" && !event.shiftKey) {
    event.preventDefault();
    search();
  }
  const isAtEnd = fields.query.selectionStart === fields.query.value.length;
  const first = byId("columns").querySelector(".hit summary");
  if (event.key === "ArrowDown" && isAtEnd && first) {
    event.preventDefault();
    moveTo(first);
  }
});

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches("input:not([type=checkbox]), textarea, select");
  if (event.key !== "/" || isTyping || form.hidden || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  fields.query.focus();
  fields.query.select();
});

// Benchmark queries, read page by page.

async function* pagesOf(index) {
  const found = benchmarks.get(index) ?? { queries: [], isWhole: false };
  benchmarks.set(index, found);
  yield found;
  while (!found.isWhole) {
    const path = `v1/indexes/${encodeURIComponent(index)}/queries?limit=${PAGE}&offset=${found.queries.length}`;
    const page = await ask(path);
    const known = new Set(found.queries.map((one) => one.id)); // two readers may have met
    for (const one of page.data) {
      if (!known.has(one.id)) found.queries.push({ ...one, gold: new Map(Object.entries(one.gold)) });
    }
    found.isWhole = !page.has_more;
    yield found;
  }
}

async function findQuery(id) {
  try {
    for await (const { queries } of pagesOf(fields.index.value)) {
      const found = queries.find((one) => one.id === id);
      if (found) return found;
    }
    say(`The index has no benchmark query ${id}.`);
  } catch (error) {
    say(error.message);
  }
  return null;
}

async function readQueries() {
  const index = fields.index.value;
  try {
    for await (const _ of pagesOf(index)) {
      if (!byId("benchmark").open || index !== fields.index.value) return;
      listQueries();
    }
  } catch (error) {
    byId("found").textContent = error.message;
  }
}

function listQueries() {
  const { queries, isWhole } = benchmarks.get(fields.index.value) ?? { queries: [], isWhole: false };
  const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = queries.filter((one) => {
    const text = `${one.id} ${one.query}`.toLowerCase();
    return words.every((word) => text.includes(word));
  });
  const buttons = matches.slice(0, LISTED).map((one) => {
    const button = make("button", { type: "button" }, make("span", { dir: "auto" }, shortened(one.query)));
    button.addEventListener("click", () => pick(one));
    return make("li", {}, button);
  });
  byId("queries").replaceChildren(...buttons);
  const shown = matches.length > LISTED ? `, the first ${LISTED} shown` : "";
  byId("found").textContent = `${matches.length} of ${queries.length}${isWhole ? "" : " read so far"}${shown}`;
}

function pick(query) {
  picked = query;
  fields.query.value = query.query;
  fields.excluded.value = query.excluded_ids.join("\n");
  byId("benchmark").open = false;
  countExcluded();
  fields.query.focus();
  search();
}

function showPicked() {
  byId("picked").hidden = picked === null;
  if (picked === null) return;
  const edited = fields.query.value === picked.query ? "" : ", edited";
  const gold = count(picked.gold.size, "gold document");
  byId("picked").querySelector("span").textContent = `Benchmark query ${picked.id}${edited}: ★ marks its ${gold}.`;
}

byId("picked").querySelector("button").addEventListener("click", () => {
  picked = null;
  fields.query.value = fields.excluded.value = "";
  countExcluded();
  showPicked();
  fields.query.focus();
});
byId("benchmark").addEventListener("toggle", () => {
  if (!byId("benchmark").open) return;
  byId("find").focus();
  readQueries();
});
byId("find").addEventListener("input", listQueries);
byId("benchmark").addEventListener("keydown", (event) => {
  const all = [byId("find"), ...byId("queries").querySelectorAll("button")];
  const place = all.indexOf(document.activeElement);
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Enter" && place === 0) {
    event.preventDefault(); // it would search for what is not chosen yet
    all[1]?.focus();
  }
  if (!step || place < 0) return;
  event.preventDefault();
  all[place + step]?.focus();
});

// The rest of the form.

form.addEventListener("submit", (event) => {
  event.preventDefault();
  search();
});
fields.index.addEventListener("change", () => {
  if (picked) fields.excluded.value = "";
  picked = null;
  countExcluded();
  showPicked();
  useIndex(chosenColumns());
  if (fields.query.value.trim()) search();
});
fields.task.addEventListener("change", () => {
  showTask();
  if (fields.task.value === OWN) fields.instruction.focus();
  else if (fields.query.value.trim()) search();
});
byId("shown").addEventListener("change", () => fields.query.value.trim() && search());
fields.excluded.addEventListener("input", countExcluded);
addEventListener("popstate", () => info !== null && indexes.length && restore());

// Two texts.

byId("comparison").querySelector("form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const { query, document: text, instruction } = event.target.elements;
  const own = instruction.value.trim();
  const embed = async (input, fieldsOfRole) => {
    const body = { model: info.model.name, input, truncate: "end", ...fieldsOfRole };
    return (await ask("v1/embeddings", { body })).data.map((one) => one.embedding);
  };
  try {
    const rows = [];
    const [bare, other] = await embed([query.value, text.value], { input_type: "document" });
    if (own && info.model.default_instruction !== null) {
      const [told] = await embed([query.value], { input_type: "query", instruction: own });
      rows.push(cosineRow("With the instruction", told, other));
    }
    rows.push(cosineRow(info.model.default_instruction === null ? "Cosine" : "Without an instruction", bare, other));
    byId("cosines").replaceChildren(...rows);
  } catch (error) {
    byId("cosines").replaceChildren(make("p", { className: "problem" }, error.message));
  }
});

function cosineRow(name, one, other) {
  const cosine = one.reduce((sum, value, place) => sum + value * other[place], 0); // norms are 1
  const meter = make("meter", { min: 0, max: 1, value: cosine, "aria-label": name });
  return make("div", { className: "cosine" }, make("span", {}, name), make("b", {}, cosine.toFixed(4)), meter);
}

start();

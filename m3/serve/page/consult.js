// The consult page: a conversation with /v1/chat/completions of this origin, stage by stage.
//
// The stage is what the page asked for, never what a model said: each stage begins with its instruction, a message of
// the page that the conversation shows. Nothing is stored. A model's words become text nodes, never markup.

const at = (id) => document.getElementById(id);
const log = at("log"), message = at("message"), advance = at("advance"), notice = at("notice");
const NAMES = [...document.querySelectorAll("#stages li")].map((item) => item.textContent.trim());
const PROMPTS = ["Your message", "Your message", "What the examinations showed", "Your message"];
const DASH = "–";
const SPAN = 0.05; // seconds over which a speed is told; less is the network's grain

let script = null; // /consult/stages.json: {closing, stages: [{phase, instruction}]}
let key = "";
let stage = 0;
let rows = []; // messages of m3.trajectory/v1: {role, content, m3: {turn, phase, meta}}
let running = null; // the AbortController of the answer under way

// -- small things ----------------------------------------------------------------------------------------------------
function element(tag, className = "", text = "") {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text) made.textContent = text;
  return made;
}

function say(text) {
  at("status").textContent = text;
}

function complain(text) {
  notice.textContent = text;
  notice.hidden = !text;
}

class Refused extends Error {
  constructor(status, text) {
    super(text);
    this.status = status;
  }
}

// A response of the API; one that is no success is thrown, with the server's own words where it has some.
async function call(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = { headers, signal, cache: "no-store" };
  if (body) {
    Object.assign(options, { method: "POST", body: JSON.stringify(body) });
    headers["content-type"] = "application/json";
  }
  const response = await fetch(path, options);
  if (response.ok) return response;
  const told = await response.text();
  let words = `The server answered ${response.status}.`;
  if (response.headers.get("content-type")?.includes("json")) words = JSON.parse(told).error?.message ?? words;
  throw new Refused(response.status, words);
}

// -- text: paragraphs, lists, headings, **bold** ---------------------------------------------------------------------
// Blocks {tag, start, lines} of a text, so far as it has come.
function blocks(text) {
  const found = [];
  let last = null, gap = true;
  const open = (tag, line, start = 1) => found.push((last = { tag, start, lines: [line] }));
  for (const line of text.split("\n")) {
    const heading = line.match(/^\s*#{1,6}\s+(.*)$/), item = line.match(/^\s*(?:[-*•]|(\d{1,3})[.)])\s+(.*)$/);
    if (!line.trim()) gap = true;
    else if (heading) open("h3", heading[1]);
    else if (item) {
      const tag = item[1] ? "ol" : "ul";
      if (last?.tag === tag) last.lines.push(item[2]);
      else open(tag, item[2], Number(item[1] ?? 1));
      gap = false;
    } else if (gap || last?.tag === "h3") open("p", line);
    else last.lines[last.lines.length - 1] += `\n${line.trim()}`;
    if (line.trim()) gap = false;
  }
  return found;
}

function fill(parent, text) {
  text.split(/\*\*([^*\n]+)\*\*/).forEach((part, n) => parent.append(n % 2 ? element("strong", "", part) : part));
  return parent;
}

const drawn = new WeakMap(); // element: the block it shows

// Show a text in a box; blocks that are as they were keep their elements.
function show(box, text) {
  const wanted = blocks(text);
  wanted.forEach((block, n) => {
    const told = JSON.stringify(block), present = box.children[n];
    if (present && drawn.get(present) === told) return;
    const made = element(block.tag);
    if (block.tag === "ol" && block.start !== 1) made.start = block.start;
    if (block.tag === "ul" || block.tag === "ol") for (const line of block.lines) made.append(fill(element("li"), line));
    else fill(made, block.lines.join("\n"));
    drawn.set(made, told);
    if (present) present.replaceWith(made);
    else box.append(made);
  });
  while (box.children.length > wanted.length) box.lastChild.remove();
}

// -- the conversation as it is seen ----------------------------------------------------------------------------------
// Add to the log, or change it, and stay at its end where the reader was there.
function following(change) {
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
  change();
  if (atEnd) log.scrollTop = log.scrollHeight;
}

function drawSaid(text) {
  const article = element("article", "said");
  const words = element("div", "words");
  show(words, text);
  article.append(element("h3", "who", "You"), words);
  return article;
}

function drawInstruction(index) {
  const section = element("section", "turning");
  const details = element("details");
  details.append(element("summary", "", "Instruction that this page sent"));
  details.append(element("p", "", script.stages[index].instruction));
  section.append(element("h3", "", NAMES[index]), details);
  return section;
}

class Answer {
  constructor() {
    this.article = element("article", "answer");
    this.article.setAttribute("aria-busy", "true");
    this.thinking = element("details", "reasoning");
    this.thinking.hidden = true;
    this.summary = element("summary", "", "Reasoning");
    this.thoughts = element("p");
    this.thinking.append(this.summary, this.thoughts);
    this.words = element("div", "words");
    this.figures = element("p", "figures");
    this.article.append(element("h3", "who", "Physician"), this.thinking, this.words, this.figures);
    this.text = this.reasoning = this.finish = "";
    this.began = performance.now();
    this.first = this.last = null; // milliseconds
    this.usage = null;
    this.atFirst = 1; // tokens that came with the first words
    this.frame = 0;
  }

  take(chunk) {
    if (chunk.error) throw new Refused(500, chunk.error.message);
    const delta = chunk.choices?.[0]?.delta ?? {};
    if (chunk.usage) this.usage = chunk.usage;
    if (delta.content || delta.reasoning_content) {
      this.last = performance.now();
      if (this.first === null) {
        this.first = this.last;
        this.atFirst = chunk.usage?.completion_tokens ?? 1;
      }
    }
    this.reasoning += delta.reasoning_content ?? "";
    this.text += delta.content ?? "";
    this.finish = chunk.choices?.[0]?.finish_reason ?? this.finish;
    this.frame ||= requestAnimationFrame(() => this.draw());
  }

  draw() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    following(() => {
      show(this.words, this.text);
      this.thinking.hidden = !this.reasoning;
      this.thoughts.textContent = this.reasoning;
      this.summary.textContent = this.text || !running ? "Reasoning" : "Reasoning…";
    });
    this.measure();
  }

  // What is known so far; null where it is not.
  get measures() {
    const usage = this.usage, details = usage?.completion_tokens_details ?? {};
    const seconds = (this.last - this.first) / 1000;
    const accepted = details.accepted_prediction_tokens ?? 0;
    return {
      tokens: usage?.completion_tokens ?? null,
      speed: usage && seconds >= SPAN ? (usage.completion_tokens - this.atFirst) / seconds : null,
      first: this.first === null ? null : (this.first - this.began) / 1000,
      accepted,
      drafted: accepted + (details.rejected_prediction_tokens ?? 0),
    };
  }

  measure() {
    const { tokens, speed, first, accepted, drafted } = this.measures;
    at("tokens").textContent = tokens ?? DASH;
    at("speed").textContent = speed === null ? DASH : speed.toFixed(1);
    at("first").textContent = first === null ? DASH : `${first.toFixed(2)} s`;
    at("draft").textContent = drafted ? `${drafted}, ${accepted}` : tokens === null ? DASH : "no draft";
    at("share").hidden = !drafted;
    if (drafted) at("share").style.setProperty("--share", accepted / drafted);
  }

  end(why) {
    this.finish = why || this.finish;
    this.draw();
    this.article.removeAttribute("aria-busy");
    const { tokens, speed, first, accepted, drafted } = this.measures;
    const told = [
      why || (this.finish === "length" && "cut at the longest answer"),
      tokens !== null && `${tokens} tokens`,
      speed !== null && `${speed.toFixed(1)} tokens/s`,
      first !== null && `first after ${first.toFixed(2)} s`,
      drafted > 0 && `${drafted} drafted, ${accepted} accepted`,
    ];
    following(() => (this.figures.textContent = told.filter(Boolean).join(" · ")));
  }

  row(turn, phase) {
    const meta = { model: at("model").value, finish: this.finish };
    if (this.reasoning) meta.reasoning = this.reasoning;
    if (this.usage) meta.usage = this.usage;
    return { role: "assistant", content: this.text, m3: { turn, phase, meta } };
  }
}

// -- one exchange ----------------------------------------------------------------------------------------------------
// Events of a stream, parsed, until [DONE].
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const data = line.startsWith("data:") ? line.slice(5).trim() : "";
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

// What goes to the server in this turn: a chat message, and before the first one the instruction of the inquiry.
function asked(text, next) {
  const turn = rows.length ? rows.at(-1).m3.turn + 1 : 0;
  const made = [];
  if (!rows.length) made.push(instructed("system", script.stages[0].instruction, turn, 0));
  if (next === stage) made.push({ role: "user", content: text, m3: { turn, phase: script.stages[stage].phase } });
  else {
    const before = next === 3 ? `Results:\n${text}` : text;
    const content = [before, script.stages[next].instruction].filter(Boolean).join("\n\n");
    made.push(instructed("user", content, turn, next));
  }
  return made;
}

function instructed(role, content, turn, index) {
  const phase = script.stages[index].phase;
  return { role, content, m3: { turn, phase, meta: { instruction: phase } } };
}

// Ask for an answer in stage ``next``; what cannot be answered at all is taken back.
async function exchange(next) {
  const text = message.value.trim();
  if (running || !script || !at("model").value) return;
  if (next === stage && !text) return;
  if (next === 3 && stage === 2 && !text) {
    complain("Write what the examinations showed, or that none was done; then go on to the diagnosis.");
    message.focus();
    return;
  }
  const before = { rows, stage };
  const made = asked(text, next);
  const answer = new Answer();
  const nodes = [];
  if (!rows.length) nodes.push(drawInstruction(0));
  if (text) nodes.push(drawSaid(text));
  if (next !== stage) nodes.push(drawInstruction(next));
  nodes.push(answer.article);

  rows = [...rows, ...made];
  stage = next;
  message.value = "";
  running = new AbortController();
  complain("");
  at("intro").hidden = true;
  log.append(...nodes);
  log.scrollTop = log.scrollHeight;
  answer.measure();
  refresh();
  say("The physician is answering.");
  let why = "";
  try {
    const response = await call("v1/chat/completions", body(), running.signal);
    for await (const chunk of events(response)) answer.take(chunk);
    if (!answer.finish) why = "broken off: the connection ended";
  } catch (error) {
    if (error.name === "AbortError") why = "stopped";
    else {
      why = "broken off";
      failed(error);
    }
  }
  running = null;
  answer.end(why);
  if (answer.text) {
    rows = [...rows, answer.row(made.at(-1).m3.turn, script.stages[stage].phase)];
    say(why ? `The answer was ${why}.` : "The answer is complete.");
  } else {
    ({ rows, stage } = before);
    for (const node of nodes) node.remove();
    at("intro").hidden = rows.length > 0;
    if (!message.value) message.value = text;
    if (!why) complain("The answer was empty. Your message is back in its box.");
    say(why === "stopped" ? "Stopped before a word was said. Your message is back in its box." : "");
  }
  refresh();
  if (at("key-form").hidden) message.focus();
}

function body() {
  return {
    model: at("model").value,
    messages: rows.map(({ role, content }) => ({ role, content })),
    temperature: at("temperature").valueAsNumber,
    max_tokens: at("longest").valueAsNumber,
    seed: at("seed").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
}

function failed(error) {
  if (error instanceof Refused && error.status === 401) {
    complain(key ? "The server refuses this API key." : "");
    at("key-form").hidden = false;
    at("key").focus();
  } else complain(error instanceof Refused ? error.message : `The server cannot be reached: ${error.message}`);
}

// -- the rest of the page --------------------------------------------------------------------------------------------
// Everything that follows from what is said, and from whether an answer is under way.
function refresh() {
  const busy = running !== null, ready = script !== null && at("model").value !== "";
  document.querySelectorAll("#stages li").forEach((item, n) => {
    item.className = n < stage ? "past" : "";
    if (n === stage) item.setAttribute("aria-current", "step");
    else item.removeAttribute("aria-current");
  });
  const answered = rows.at(-1)?.role === "assistant";
  const closing = answered && stage === 0 && rows.at(-1).content.toLowerCase().includes(script.closing);
  const due = closing || (answered && stage > 0);
  advance.hidden = stage === 3;
  advance.textContent = stage < 3 ? `Next: ${NAMES[stage + 1].toLowerCase()}` : "";
  advance.disabled = busy || !answered;
  advance.classList.toggle("due", due && !busy);
  at("advance-why").textContent =
    stage === 3 ? "The last stage." : closing ? "The physician says it has no further questions."
      : stage === 2 && answered ? "Write the results in the box first." : "";
  at("message-label").textContent = message.placeholder = PROMPTS[answered ? stage : 0];
  at("send").hidden = busy;
  at("send").disabled = !ready;
  at("stop").hidden = !busy;
  at("model").disabled = busy || !at("model").options.length;
  for (const id of ["copy", "download"]) at(id).disabled = busy || !rows.length;
  at("new").disabled = busy || !rows.length;
}

// The consultation as one line of m3.trajectory/v1, which m3 reads.
function transcript() {
  const meta = { source: "m3 consult page", disclaimer: at("disclaimer").textContent.replace(/\s+/g, " ").trim() };
  meta.temperature = at("temperature").valueAsNumber;
  return JSON.stringify({
    schema: "m3.trajectory/v1", case: "", case_version: 0, policy: at("model").value, seed: at("seed").valueAsNumber,
    rollout: 0, mode: "recorded", ended: "", messages: rows, meta,
  });
}

function begin() {
  rows = [];
  stage = 0;
  at("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] % 10000;
  log.replaceChildren(at("intro"));
  at("intro").hidden = false;
  message.value = "";
  new Answer().measure();
  complain("");
  refresh();
}

async function connect() {
  try {
    script ??= await (await call("consult/stages.json")).json();
    const { data } = await (await call("v1/models")).json();
    const chosen = at("model").value;
    at("model").replaceChildren(...data.map(({ id }) => element("option", "", id)));
    if (data.some(({ id }) => id === chosen)) at("model").value = chosen;
    at("key-form").hidden = true;
    complain("");
    message.focus();
  } catch (error) {
    failed(error);
  }
  refresh();
}

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  exchange(stage);
});
message.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    exchange(stage);
  }
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
at("stop").addEventListener("click", () => running?.abort());
advance.addEventListener("click", () => exchange(stage + 1));
at("new").addEventListener("click", () => {
  if (confirm("End this consultation? It is not stored.")) begin();
  message.focus();
});
at("download").addEventListener("click", () => {
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([`${transcript()}\n`], { type: "application/jsonl" }));
  link.download = "consultation.jsonl";
  link.click();
  URL.revokeObjectURL(link.href);
});
at("copy").hidden = !navigator.clipboard; // browsers have one on https and localhost only
at("copy").addEventListener("click", async () => {
  try {
    await navigator.clipboard.writeText(transcript());
    say("The transcript is copied.");
  } catch (error) {
    complain(`Not copied: ${error.message}`);
  }
});
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value.trim();
  at("key").value = "";
  connect();
});
at("more").open = matchMedia("(min-width: 60rem)").matches;

begin();
connect();

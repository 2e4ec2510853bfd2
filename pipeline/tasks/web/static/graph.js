// The stages of a pipeline: a chain with its queues, and a table of its numbers.
//
// The rule kept here: elements are made once for a graph; what changes afterwards are texts and widths.

import { count, latency, make, put, rate } from "./text.js";

const KINDS = ["busy", "starved", "blocked"];
const MEANING = { busy: "busy", starved: "waits for input", blocked: "waits for room" };

// The stages that data tells of; null if it tells of none. Work may send what it likes under any name.
export function stagesOf(data) {
  const stages = data?.stages;
  return Array.isArray(stages) && stages.every((stage) => typeof stage?.name === "string") ? stages : null;
}

export class Graph {
  constructor(chain, table) {
    this.chain = chain;
    this.table = table;
    this.clear();
  }

  clear() {
    this.shape = null;
    this.before = null;
    this.rates = [];
    this.shares = [];
    this.limit = -1;
    this.chain.replaceChildren();
    this.table.replaceChildren();
  }

  // `stages` are those of the `started` event; `snapshot` is the newest progress, or the report at the end.
  show(stages, snapshot, over) {
    const rows = stagesOf(snapshot) ?? [];
    const known = rows.length ? rows : stages;
    this.build(known.map((row, index) => ({ ...row, run_in: stages[index]?.run_in ?? null })));
    if (!rows.length) return;
    this.measure(snapshot, rows, over);
    put(this.source.lastChild, count(snapshot.pulled));
    put(this.output.lastChild, count(snapshot.delivered));
    rows.forEach((row, index) => {
      this.showStage(this.cards[index], row, index, over);
      this.showRow(this.lines[index], row, index);
    });
  }

  build(stages) {
    const shape = JSON.stringify(stages.map((stage) => [stage.name, stage.run_in, stage.concurrency]));
    if (shape === this.shape) return;
    this.clear();
    this.shape = shape;
    this.source = end("Source", "pulled");
    this.output = end("Output", "delivered");
    this.cards = stages.map(card);
    this.lines = stages.map(line);
    this.chain.append(this.source, ...this.cards.map((one) => one.item), this.output);
    this.table.append(...this.lines.map((one) => one.row));
  }

  // What has happened since the snapshot before; over the whole run, when it is over.
  measure(snapshot, rows, over) {
    const elapsed = snapshot.elapsed ?? snapshot.duration ?? 0;
    const before = over || !this.before || elapsed < this.before.elapsed ? { elapsed: 0, stages: [] } : this.before;
    const passed = elapsed - before.elapsed;
    if (passed < 0.05 && this.rates.length && !over) return;
    this.rates = rows.map((row, index) => (row.processed - (before.stages[index]?.processed ?? 0)) / Math.max(passed, 0.001));
    this.shares = rows.map((row, index) => shares(row, before.stages[index], rows[index + 1], passed));
    this.limit = limiting(this.shares);
    this.before = { elapsed, stages: rows };
  }

  showStage(card, row, index, over) {
    const [busy, starved, blocked] = this.shares[index];
    const mostly = KINDS[[busy, starved, blocked].indexOf(Math.max(busy, starved, blocked))];
    const limit = index === this.limit && this.shares.length > 1;
    card.item.dataset.mostly = over ? "over" : mostly;
    card.item.dataset.limit = limit;
    put(card.doing, over ? (limit ? "the limit" : "") : limit ? `the limit, ${MEANING[mostly]}` : MEANING[mostly]);
    put(card.queued, row.queued || row.capacity ? `${count(row.queued)} of ${count(row.capacity)}` : "–");
    fill(card.queue, row.capacity ? row.queued / row.capacity : 0);
    put(card.rate, `${rate(this.rates[index])}/s`);
    put(card.failed, row.failed ? `${count(row.failed)} failed` : "");
  }

  showRow(line, row, index) {
    const values = [row.received, row.queued, row.in_flight, row.emitted, row.failed, row.retried].map(count);
    [...values, rate(this.rates[index]), latency(row.latency_p95)].forEach((text, column) => put(line.cells[column], text));
    line.cells[4].dataset.bad = row.failed > 0;
    this.shares[index].forEach((share, kind) => fill(line.parts[kind], share));
    const text = this.shares[index].map((share, kind) => `${Math.round(share * 100)}% ${MEANING[KINDS[kind]]}`);
    put(line.words, text.filter((part) => !part.startsWith("0%")).join(", ") || "–");
  }
}

// Busy, starved and blocked, as shares of the time of all workers. Waiting is counted when it is over, so what is not
// counted yet is told from where the items are. A stage that only holds items, such as a batch, has no time at work:
// while it holds some it waits for more.
export function shares(row, before, next, passed) {
  const all = passed * Math.max(row.concurrency, 1);
  if (!(all > 0)) return [0, 0, 0];
  const found = KINDS.map((kind) => Math.max(row[kind] - (before?.[kind] ?? 0), 0));
  const sum = found.reduce((total, one) => total + one, 0);
  if (sum < all && row.received) found[now(row, next)] += all - sum;
  return found.map((one) => one / Math.max(all, sum));
}

function now(row, next) {
  if (next && next.capacity > 0 && next.queued >= next.capacity) return 2;
  return row.in_flight > 0 && (row.busy > 0 || row.processed === 0) ? 0 : 1;
}

// The busiest; among those that are about as busy, the last one, for the others wait for it.
function limiting(all) {
  const busy = all.map(([share]) => share);
  const most = Math.max(...busy);
  return most > 0.3 ? busy.findLastIndex((share) => share >= most - 0.05) : -1;
}

function fill(element, share) {
  const width = `${(Math.min(Math.max(share, 0), 1) * 100).toFixed(1)}%`;
  if (element.style.width !== width) element.style.width = width;
}

function end(name, what) {
  return make("li", { className: "end" }, make("span", { className: "label" }, `${name}, ${what}`), make("strong", {}, "0"));
}

function card(stage) {
  const queued = make("span", {}, "–");
  const queue = make("span", { className: "fill" });
  const doing = make("span", { className: "doing" });
  const failed = make("span", { className: "failed" });
  const each = make("strong", {}, "–");
  const edge = make("p", { className: "edge" }, make("span", { className: "label" }, "queued"), queued, make("span", { className: "meter", "aria-hidden": "true" }, queue));
  const body = make("div", { className: "stage" }, make("p", { className: "title" }, stage.name), make("p", { className: "where" }, where(stage)), make("p", { className: "rate" }, each, failed), doing);
  return { item: make("li", {}, edge, body), queued, queue, doing, failed, rate: each };
}

function where(stage) {
  const place = { loop: "event loop", thread: "threads", process: "processes" }[stage.run_in] ?? stage.run_in ?? "";
  return [place, stage.concurrency > 1 ? `× ${stage.concurrency}` : ""].filter(Boolean).join(" ") || " ";
}

function line(stage) {
  const cells = Array.from({ length: 8 }, () => make("td", {}, "–"));
  const parts = KINDS.map((kind) => make("span", { className: `fill ${kind}` }));
  const said = make("span", { className: "shares" });
  const time = make("td", { className: "words" }, make("span", { className: "split", "aria-hidden": "true" }, ...parts), said);
  const row = make("tr", {}, make("th", { scope: "row" }, stage.name), ...cells, time);
  return { row, cells, parts, words: said };
}

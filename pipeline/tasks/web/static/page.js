// The page: a list of tasks, and one of them in detail.
//
// The rules kept here: what comes is collected, and shown eight times a second, however much it is. A page that nobody looks at
// holds no connection; it goes on where it was when it is looked at again.

import { EventList, Follower } from "./events.js";
import { Graph, stagesOf } from "./graph.js";
import { MOST, TaskList, keyOf, over } from "./list.js";
import { count, duration, make, moment, put, words } from "./text.js";

const $ = (id) => document.getElementById(id);
const list = new TaskList($("tasks"), $("find"), $("count"));
const graph = new Graph($("chain"), $("stages"));
const events = new EventList($("events"), $("kept"));

const ENDS = { completed: "The task is completed.", error: "The task has failed.", cancelled: "The task was cancelled.", timed_out: "The task has timed out." };
const EVERY = 2000; // milliseconds from one list to the next
const REST = 120; // and from one drawing to the next: nobody reads faster
const KEPT = 1000; // events, and characters of their data
const LONGEST = 2e7;
let task = null; // the one that is shown: { key, status, stages, snapshot, all, fresh, follower }
let tag = "";
let tokenNeeded = false;
let drawing = false;
let drawn = 0;
let timer = null;

// --- the list

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const response = await fetch(`tasks?limit=${MOST}`, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
    list.skew = Number(response.headers.get("x-time") ?? Date.now() / 1000) - Date.now() / 1000;
    if (response.status === 200) took(await response.json(), response.headers.get("etag"));
    else if (response.status !== 304) throw new Error(`the server answers ${response.status}`);
    connected("live");
  } catch {
    connected("lost");
  }
  list.show(list.tasks, task?.key);
  timer = setTimeout(poll, EVERY);
}

function took(told, etag) {
  tag = etag ?? "";
  tokenNeeded = told.token_required;
  list.tasks = told.tasks;
  const row = task && told.tasks.find((one) => keyOf(one) === task.key);
  if (row && isNews(row, task)) refresh(task);
}

// Whether the list knows something of a task that its events do not tell: it is asked to stop, or started again.
function isNews(row, { status, ended, follower }) {
  return row.state !== status?.state || row.attempt !== status.attempt || row.seq < status.seq || (ended && row.seq > follower.last);
}

function connected(how) {
  $("link").dataset.link = how;
  put($("link"), how === "live" ? "live" : "connection lost, trying again");
}

// --- one task

function choose() {
  const key = location.hash.startsWith("#/") ? keyIn(location.hash.slice(2)) : (task?.key ?? "");
  if (key === (task?.key ?? "")) return;
  task?.follower.close();
  task = key ? { key, status: null, stages: [], snapshot: null, all: [], fresh: [], ended: false } : null;
  document.body.dataset.chosen = Boolean(task);
  $("task").hidden = !task;
  $("blank").hidden = Boolean(task);
  put($("said"), "");
  $("reason").value = "";
  graph.clear();
  events.clear();
  list.show(list.tasks, task?.key);
  if (!task) return;
  put($("name"), decoded(key).slice(1).join(" "));
  const chosen = task;
  task.follower = new Follower(`tasks/${key}/events`, { onEvent: (event) => heard(chosen, event), onLink: connected });
  if (!document.hidden) task.follower.open();
  refresh(task);
}

const decoded = (key) => key.split("/").map((part) => {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
});

// The task that an address names; none for one that would lead elsewhere on this server, whoever has made that link.
function keyIn(path) {
  const parts = decoded(path);
  const good = parts.length === 3 && parts.every((part) => !["", ".", ".."].includes(part));
  return good ? parts.map(encodeURIComponent).join("/") : "";
}

async function refresh(chosen) {
  try {
    const response = await fetch(`tasks/${chosen.key}`, { cache: "no-store" });
    const told = await response.json();
    if (chosen !== task) return;
    if (response.ok) arrived(chosen, told);
    else say(told.error);
  } catch {
    connected("lost");
  }
}

function arrived(chosen, status) {
  const again = chosen.ended && (!over(status) || status.seq > chosen.follower.last);
  chosen.status = status;
  if (again) {
    chosen.ended = false;
    chosen.follower.open();
  }
  draw();
}

function heard(chosen, event) {
  if (chosen !== task) return;
  chosen.fresh.push(event);
  if (event.type === "started") {
    chosen.stages = stagesOf(event.data) ?? [];
    chosen.snapshot = null;
    chosen.ended = false;
  } else if (event.type === "progress") {
    chosen.snapshot = event.data;
  } else if (chosen.follower.source === null) {
    chosen.ended = true;
    chosen.snapshot = stagesOf(event.data) ? event.data : (event.data.report ?? chosen.snapshot);
    if (chosen.status && !over(chosen.status)) say(ENDS[event.type]);
    refresh(chosen);
    poll();
  }
  draw();
}

function draw() {
  if (drawing) return;
  drawing = true;
  setTimeout(() => requestAnimationFrame(() => {
    drawing = false;
    drawn = performance.now();
    if (task) show(task);
  }), Math.max(drawn + REST - performance.now(), 0));
}

function show(chosen) {
  const { status, fresh } = chosen;
  if (fresh.length) {
    events.show(fresh, $("all").checked);
    chosen.all = newest(chosen.all.concat(fresh));
    chosen.fresh = [];
  }
  const snapshot = chosen.snapshot ?? status?.progress;
  const stages = chosen.stages.length ? chosen.stages : (stagesOf(status?.about) ?? []);
  const isPipeline = stages.length > 0 || stagesOf(snapshot) !== null;
  $("pipeline").hidden = !isPipeline;
  $("progress").hidden = isPipeline || !snapshot;
  if (isPipeline) graph.show(stages, snapshot, chosen.ended);
  else if (snapshot) showProgress(snapshot);
  if (status) showStatus(status);
}

// What is kept, to be shown again when the filter changes.
function newest(all) {
  let room = LONGEST;
  let first = all.length;
  while (first > 0 && all.length - first < KEPT && (room -= all[first - 1].size) > 0) first -= 1;
  return all.slice(first);
}

function showProgress({ done, total, message }) {
  const bar = $("bar");
  if (Number.isFinite(total) && total > 0) Object.assign(bar, { max: total, value: Math.min(done ?? 0, total) });
  else bar.removeAttribute("value");
  const numbers = Number.isFinite(done) ? `${count(done)}${Number.isFinite(total) ? ` of ${count(total)}` : ""}` : "";
  put($("done"), [numbers, message].filter((part) => part !== undefined && part !== null && part !== "").join("  "));
}

function showStatus(status) {
  put($("name"), `${status.name} ${status.id}`);
  put($("state"), words(status.state));
  $("state").dataset.state = status.state;
  const began = status.started ?? status.created;
  const facts = [["App", status.app], ["Started", status.started ? moment(status.started) : "not yet"], [status.ended ? "Took" : "For", duration((status.ended ?? list.now()) - began)]];
  if (status.attempt > 1) facts.push(["Attempt", String(status.attempt)]);
  if (status.worker) facts.push(["Worker", status.worker]);
  showFacts(facts);
  showReasons(status);
  $("cancel").hidden = over(status);
  $("token-field").hidden = !tokenNeeded;
  put($("stop"), status.state === "cancelling" ? "Add a reason" : "Cancel task");
}

function showFacts(facts) {
  const rows = $("facts").children;
  if (rows.length !== facts.length) $("facts").replaceChildren(...facts.map(() => make("div", {}, make("dt"), make("dd"))));
  facts.forEach(([name, value], index) => {
    put(rows[index].firstChild, name);
    put(rows[index].lastChild, value);
  });
}

function showReasons(status) {
  const failed = status.state === "error" && status.result ? [{ message: status.result.message, cancel_type: status.result.type ?? "error" }] : [];
  const all = [...failed, ...status.reasons];
  $("why").hidden = !all.length;
  $("why").dataset.state = status.state;
  const texts = all.map((reason) => [reason.message, [reason.cancel_type, reason.code, reason.origin && `from ${reason.origin}`, reason.at && moment(reason.at)].filter(Boolean).join(", ")]);
  const rows = $("reasons").children;
  if (rows.length !== texts.length) $("reasons").replaceChildren(...texts.map(() => make("li", {}, make("strong"), make("span"))));
  texts.forEach(([message, about], index) => {
    put(rows[index].firstChild, message ?? "");
    put(rows[index].lastChild, about);
  });
}

// --- cancelling

const say = (text) => put($("said"), text);

async function cancel(submitted) {
  submitted.preventDefault();
  const chosen = task;
  const headers = { "Content-Type": "application/json" };
  if (tokenNeeded) headers.Authorization = `Bearer ${$("token").value.trim()}`;
  say("");
  try {
    const response = await fetch(`tasks/${chosen.key}/cancel`, { method: "POST", headers, body: JSON.stringify({ reason: $("reason").value }) });
    const told = await response.json();
    if (response.status === 401) refused(told.error);
    else if (!response.ok) say(told.error);
    else cancelled(chosen, told.cancelled);
  } catch {
    say("The server could not be reached. Nothing was cancelled.");
  }
  await refresh(chosen);
  poll();
}

function refused(why) {
  say(`Not cancelled: ${why.split(";")[0]}.`);
  $("token").focus();
}

function cancelled(chosen, was) {
  if (!chosen.ended) say(was ? "Asked to stop; it is cleaning up." : "It was over already.");
  if (was) $("reason").value = "";
  if (tokenNeeded) sessionStorage.setItem("token", $("token").value);
}

// --- always

$("cancel").addEventListener("submit", cancel);
$("token").value = sessionStorage.getItem("token") ?? "";
$("all").addEventListener("change", () => {
  const told = task?.all ?? [];
  events.clear();
  events.show(told, $("all").checked);
});
document.addEventListener("visibilitychange", () => {
  if (document.hidden) task?.follower.close();
  else {
    if (task && !task.ended) task.follower.open();
    poll();
  }
});
addEventListener("hashchange", choose);
setInterval(() => !document.hidden && task?.status && !task.ended && draw(), 1000);
document.body.dataset.chosen = false;
choose();
poll();

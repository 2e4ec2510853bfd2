// The events of one task: followed as they come, and shown as a list, the newest first.
//
// The rule kept here: the list is bounded, and whatever was left out is said.

import { stagesOf } from "./graph.js";
import { brief, count, make, moment, put, words } from "./text.js";

const TYPES = ["started", "progress", "item", "warning", "error", "cancelled", "timed_out", "completed"];
const MOST = 200;

// Follows a task until its terminal event, over lost connections and restarts of the server.
export class Follower {
  constructor(url, { onEvent, onLink }) {
    this.url = url;
    this.onEvent = onEvent;
    this.onLink = onLink;
    this.last = null;
    this.wait = 500;
    this.source = null;
    this.timer = null;
  }

  open() {
    this.close();
    const source = new EventSource(this.last === null ? this.url : `${this.url}?last_event_id=${this.last}`);
    this.source = source;
    source.addEventListener("open", () => {
      this.wait = 500;
      this.onLink("live");
    });
    // An event of the task's that is called "error" has data; the browser's own, about the connection, has none.
    for (const type of TYPES) source.addEventListener(type, (message) => message.data !== undefined && this.take(message));
    source.addEventListener("error", (message) => message.data === undefined && this.lost(source));
  }

  take(message) {
    const event = { ...JSON.parse(message.data), size: message.data.length };
    this.last = event.seq;
    if (["error", "cancelled", "timed_out", "completed"].includes(event.type)) this.close();
    this.onEvent(event);
  }

  // The browser tries again by itself, unless it was given an answer that it does not understand.
  lost(source) {
    this.onLink("lost");
    if (source.readyState !== EventSource.CLOSED || source !== this.source) return;
    this.timer = setTimeout(() => this.open(), this.wait);
    this.wait = Math.min(this.wait * 2, 10000);
  }

  close() {
    clearTimeout(this.timer);
    this.source?.close();
    this.source = null;
  }
}

export class EventList {
  constructor(list, kept) {
    this.list = list;
    this.kept = kept;
    this.clear();
  }

  clear() {
    this.told = 0;
    this.dropped = 0;
    this.list.replaceChildren();
    put(this.kept, "");
  }

  show(events, withProgress) {
    const shown = events.filter((event) => withProgress || event.type !== "progress");
    const rows = shown.slice(-MOST).map((event) => row(event)).reverse();
    this.list.prepend(...rows);
    while (this.list.childElementCount > MOST) this.list.lastElementChild.remove();
    this.told += shown.length;
    this.dropped += events.reduce((sum, event) => sum + (event.dropped ?? 0), 0);
    const parts = this.told > MOST ? [`the newest ${MOST} of ${count(this.told)}`] : [];
    if (this.dropped) parts.push(`${count(this.dropped)} left out by the server`);
    put(this.kept, parts.join("; "));
  }
}

function row(event) {
  const title = [make("span", { className: "seq" }, String(event.seq)), make("time", { dateTime: new Date(event.at * 1000).toISOString() }, moment(event.at)), make("span", { className: "mark", data: { state: event.type } }, words(event.type)), make("span", { className: "text" }, summary(event))];
  if (event.dropped) title.push(make("span", { className: "quiet" }, `after ${count(event.dropped)} that were left out`));
  if (!Object.keys(event.data).length) return make("li", {}, make("p", {}, ...title));
  const details = make("details", {}, make("summary", {}, ...title));
  details.addEventListener("toggle", () => details.append(...whole(event.data)), { once: true });
  return make("li", {}, details);
}

// The data in full, up to some length; a traceback as the lines that it is.
function whole({ traceback, ...rest }) {
  const texts = [typeof traceback === "string" ? traceback.trimEnd() : "", JSON.stringify(rest, null, 2)];
  return texts.filter(Boolean).map((text) => make("pre", { tabIndex: 0 }, brief(text, 20000)));
}

function summary({ type, data }) {
  if (typeof data.message === "string") return brief(data.type ? `${data.type}: ${data.message}` : data.message);
  const stages = stagesOf(data);
  if (type === "started" && stages) return `${stages.length} ${stages.length === 1 ? "stage" : "stages"}: ${brief(stages.map((stage) => stage.name).join(" → "))}`;
  if (type === "item") return brief("item" in data ? data.item : data);
  if (stages) return `${count(data.pulled)} pulled, ${count(data.delivered)} delivered`;
  if ("value" in data) return brief(data.value);
  return Object.keys(data).length ? brief(data) : "";
}

// The list of tasks: asked for every two seconds, and changed where something has changed.
//
// The rule kept here: a link stays the same element as long as its task is listed, so that focus and scrolling stay, too.

import { count, duration, make, put, words } from "./text.js";

export const keyOf = (task) => [task.app, task.name, task.id].map(encodeURIComponent).join("/");
export const MOST = 500; // tasks in the list
export const over = (task) => !["queued", "running", "cancelling"].includes(task.state);

export class TaskList {
  constructor(list, find, found) {
    this.list = list;
    this.find = find;
    this.found = found;
    this.rows = new Map();
    this.tasks = [];
    this.skew = 0;
    find.addEventListener("input", () => this.filter());
  }

  // Seconds since the epoch, by the server's clock.
  now() {
    return Date.now() / 1000 + this.skew;
  }

  show(tasks, selected) {
    this.tasks = tasks;
    const kept = new Set();
    let place = this.list.firstElementChild;
    for (const task of tasks) {
      const key = keyOf(task);
      kept.add(key);
      const row = this.rows.get(key) ?? this.add(key);
      if (row.item === place) place = place.nextElementSibling;
      else this.list.insertBefore(row.item, place);
      this.update(row, task, key === selected);
    }
    for (const [key, row] of this.rows) if (!kept.has(key)) this.drop(key, row);
    this.filter();
  }

  add(key) {
    const row = { name: make("span", { className: "name" }), state: make("span", { className: "mark" }), about: make("span", { className: "about" }), time: make("span", { className: "time" }) };
    row.link = make("a", { href: `#/${key}` }, row.name, row.state, row.about, row.time);
    row.item = make("li", {}, row.link);
    this.rows.set(key, row);
    return row;
  }

  drop(key, row) {
    row.item.remove();
    this.rows.delete(key);
  }

  update(row, task, selected) {
    put(row.name, `${task.name} ${task.id}`);
    put(row.state, words(task.state));
    row.state.dataset.state = task.state;
    put(row.about, about(task));
    this.tick(row, task);
    if (selected) row.link.setAttribute("aria-current", "page");
    else row.link.removeAttribute("aria-current");
    row.text = `${task.app} ${task.name} ${task.id} ${words(task.state)}`.toLowerCase();
  }

  tick(row, task) {
    const began = task.started ?? task.created;
    put(row.time, began ? duration((task.ended ?? this.now()) - began) : "");
  }

  filter() {
    const wanted = this.find.value.trim().toLowerCase().split(/\s+/);
    let shown = 0;
    for (const row of this.rows.values()) {
      row.item.hidden = !wanted.every((word) => row.text.includes(word));
      shown += row.item.hidden ? 0 : 1;
    }
    const running = this.tasks.filter((task) => !over(task)).length;
    const all = this.tasks.length;
    const which = `${all < MOST ? "" : "the newest "}${count(all)}`;
    put(this.found, all === 0 ? "There are no tasks yet" : shown < all ? `${count(shown)} of ${which} shown` : `${which} ${all === 1 ? "task" : "tasks"}, ${count(running)} not over`);
  }
}

function about(task) {
  const progress = task.progress ?? {};
  const parts = [task.app];
  if (task.message) parts.push(task.message);
  else if (Number.isFinite(progress.delivered)) parts.push(`${count(progress.delivered)} delivered`);
  else if (Number.isFinite(progress.done)) parts.push(Number.isFinite(progress.total) ? `${count(progress.done)} of ${count(progress.total)}` : `${count(progress.done)} done`);
  return parts.join(" · ");
}

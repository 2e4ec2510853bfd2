// Numbers, times and elements. The rule kept here: whatever a task says goes into text nodes, never into markup.

const whole = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en-GB", { hour: "2-digit", minute: "2-digit", second: "2-digit" });
const day = new Intl.DateTimeFormat("en-GB", { day: "numeric", month: "short" });

export const count = (number) => (Number.isFinite(number) ? whole.format(number) : "–");

export function rate(number) {
  if (!Number.isFinite(number)) return "–";
  if (number >= 100) return whole.format(Math.round(number));
  return number.toFixed(number >= 10 ? 1 : 2);
}

export function latency(seconds) {
  if (!(seconds > 0)) return "–";
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  if (seconds >= 0.001) return `${(seconds * 1e3).toFixed(seconds >= 0.1 ? 0 : 1)} ms`;
  return `${(seconds * 1e6).toFixed(0)} µs`;
}

export function duration(seconds) {
  if (!(seconds >= 0)) return "";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  const all = Math.floor(seconds);
  if (all < 60) return `${all} s`;
  const two = (number) => String(number).padStart(2, "0");
  if (all < 3600) return `${Math.floor(all / 60)}:${two(all % 60)} min`;
  if (all < 172800) return `${Math.floor(all / 3600)}:${two(Math.floor(all / 60) % 60)} h`;
  return `${Math.floor(all / 86400)} days`;
}

export function moment(at) {
  const date = new Date(at * 1000);
  const today = new Date().toDateString() === date.toDateString();
  return today ? clock.format(date) : `${day.format(date)}, ${clock.format(date)}`;
}

export const words = (state) => String(state).replaceAll("_", " ");

// An element with these properties and children; a string becomes a text node.
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "data") Object.assign(element.dataset, value);
    else if (name.includes("-") || name === "role" || name === "scope") element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

// Change a text only if it is another one: nothing is laid out again for what stays.
export function put(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

export function brief(data, most = 300) {
  const text = typeof data === "string" ? data : JSON.stringify(data);
  return text.length > most ? `${text.slice(0, most)} …` : text;
}

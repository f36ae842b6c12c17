// What the server answers, as objects.

/** The server said no, or gave up; `message` is its own. */
export class Refused extends Error {
  constructor(error, status) {
    super(error.message);
    this.status = status;
  }
}

function authorization(key) {
  return key ? { Authorization: `Bearer ${key}` } : {};
}

async function refusal(response) {
  let error = { message: `the server answers with status ${response.status}` };
  try {
    error = (await response.json()).error ?? error;
  } catch {
    // Not the server's own words: something between it and here.
  }
  return new Refused(error, response.status);
}

/** GET, as JSON. Throws Refused, or TypeError if nobody answers. */
export async function read(url, key) {
  const response = await fetch(url, { headers: authorization(key) });
  if (!response.ok) throw await refusal(response);
  return response.json();
}

/** POST; yields every server-sent event until [DONE]. Throws like `read`, and what `signal` throws when it aborts. */
export async function* events(url, body, key, signal) {
  const headers = { "Content-Type": "application/json", ...authorization(key) };
  const response = await fetch(url, { method: "POST", headers, body: JSON.stringify(body), signal });
  if (!response.ok) throw await refusal(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer did");
    const parts = (waiting + value).split("\n\n");
    waiting = parts.pop();
    for (const part of parts) {
      const data = part.slice("data: ".length);
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new Refused(event.error, response.status);
      yield event;
    }
  }
}

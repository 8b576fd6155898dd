// The gateway's HTTP API for a bearer of a JWT. Errors are RFC 9457 problem documents.

import { CommandError } from "./pusher-client.js";

export class Api {
  #token;

  constructor(token) {
    this.#token = token;
  }

  /** POST /sessions: the streamer's live session, made if there is none. */
  goLive() {
    return this.#call("POST", "/sessions", {});
  }

  endStream(sessionId) {
    return this.#call("DELETE", `/sessions/${sessionId}`);
  }

  /** The session, or null if there is none of this id. */
  session(sessionId) {
    return this.#orNull(`/sessions/${sessionId}`);
  }

  /** The goal, or null if there is none of this id. */
  goal(goalId) {
    return this.#orNull(`/goals/${goalId}`);
  }

  async #orNull(path) {
    try {
      return await this.#call("GET", path);
    } catch (error) {
      if (error.status === 404) return null;
      throw error;
    }
  }

  async #call(method, path, body) {
    const headers = { authorization: `Bearer ${this.#token}` };
    if (body !== undefined) headers["content-type"] = "application/json";
    let response;
    try {
      response = await fetch(path, { method, headers, body: JSON.stringify(body), cache: "no-store" });
    } catch {
      throw new CommandError({ code: "unreachable", message: "The gateway can't be reached.", retryable: true });
    }
    const answer = await response.json().catch(() => null);
    if (response.ok) return answer;
    const error = new CommandError({
      code: answer?.code ?? `http_${response.status}`,
      message: answer?.detail ?? answer?.title ?? `The gateway answered ${response.status}.`,
      retryable: answer?.retryable ?? response.status >= 500,
    });
    error.status = response.status;
    throw error;
  }
}

// Which stream is on air. On a platform the viewers' app learns it from the platform's own
// pages; here the streamer's panel tells the viewers' panels.

export class Stage extends EventTarget {
  #sessionId;

  /**
   * @param {string} streamerId
   * @param {string|null} sessionId the live session, if there is one already
   */
  constructor(streamerId, sessionId) {
    super();
    this.streamerId = streamerId;
    this.#sessionId = sessionId;
  }

  /** The live session's id, or null when the streamer is off air. */
  get sessionId() {
    return this.#sessionId;
  }

  set sessionId(sessionId) {
    if (sessionId === this.#sessionId) return;
    this.#sessionId = sessionId;
    this.dispatchEvent(new Event("change"));
  }
}

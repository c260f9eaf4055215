// The contract on Go's net/http: a goroutine per request, a write and a flush per event.
//
// A client that leaves cancels the request's context, which everything that waits looks at. Built
// and run by the bench; needs nothing but the standard library.
package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log"
	"net"
	"net/http"
	"net/url"
	"os"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

const text = "The quick brown fox jumps over the dog"

// Time

const clockMonotonic = 1 // of clock_gettime(2), on Linux

var (
	began   = time.Now()
	beganAt = askMonotonic()
)

func askMonotonic() int64 {
	var at syscall.Timespec
	_, _, failed := syscall.Syscall(
		syscall.SYS_CLOCK_GETTIME, clockMonotonic, uintptr(unsafe.Pointer(&at)), 0)
	if failed != 0 {
		log.Fatal(failed)
	}
	return at.Nano()
}

// monotonic is CLOCK_MONOTONIC in nanoseconds. Go's own readings are of the same clock, and cost no
// system call, but begin elsewhere.
func monotonic() int64 {
	return beganAt + int64(time.Since(began))
}

type moment struct {
	millisecond int64
	text        string
}

var lastMoment atomic.Pointer[moment]

// now formats a time once per millisecond, as everywhere: that is not what is compared.
func now() string {
	at := time.Now()
	millisecond := at.UnixMilli()
	if last := lastMoment.Load(); last != nil && last.millisecond == millisecond {
		return last.text
	}
	made := &moment{millisecond, at.UTC().Format("2006-01-02T15:04:05.000Z")}
	lastMoment.Store(made)
	return made.text
}

// What is asked for

type order struct {
	events    int
	gap, hold time.Duration
	key       string
	upstream  string
	stamp     bool
	runID     string
}

func orderOf(query url.Values) order {
	events, _ := strconv.Atoi(query.Get("events"))
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		log.Fatal(err)
	}
	return order{
		events:   events,
		gap:      seconds(query.Get("gap")),
		hold:     seconds(query.Get("hold")),
		key:      query.Get("key"),
		upstream: query.Get("upstream"),
		stamp:    query.Get("stamp") == "1",
		runID:    base64.RawURLEncoding.EncodeToString(id),
	}
}

func seconds(text string) time.Duration {
	number, _ := strconv.ParseFloat(text, 64)
	return time.Duration(number * float64(time.Second))
}

// Events

type value struct {
	N    int    `json:"n"`
	Text string `json:"text"`
}

type event struct {
	Type   string `json:"type"`
	RunID  string `json:"run_id"`
	Seq    int    `json:"seq"`
	TS     string `json:"ts"`
	Name   string `json:"name,omitempty"`
	Value  *value `json:"value,omitempty"`
	PartID string `json:"part_id,omitempty"`
	Delta  string `json:"delta,omitempty"`
}

func frame(o order, n int) []byte {
	made := event{Type: "custom", RunID: o.runID, Seq: n, TS: now()}
	if o.stamp {
		made.Type, made.PartID = "part_delta", "p1"
		made.Delta = strconv.FormatInt(monotonic(), 10) + ";"
	} else {
		made.Name, made.Value = "tick", &value{n, text}
	}
	data, err := json.Marshal(made)
	if err != nil {
		log.Fatal(err)
	}
	return []byte(fmt.Sprintf("id: %d\nevent: %s\ndata: %s\n\n", n, made.Type, data))
}

// The counter

type counter struct {
	mutex                  sync.Mutex
	started, entered, gone int
	times                  map[string][2]*int64
}

var count = counter{times: map[string][2]*int64{}}

func (c *counter) start() {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.started++
}

func (c *counter) enter(key string) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.entered++
	if key != "" {
		at := monotonic()
		c.times[key] = [2]*int64{&at, nil}
	}
}

func (c *counter) leave(key string) {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	c.gone++
	if key != "" {
		at := monotonic()
		c.times[key] = [2]*int64{c.times[key][0], &at}
	}
}

// shown forgets what is complete once it was shown.
func (c *counter) shown(withTimes bool) map[string]any {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	shown := map[string]any{
		"started": c.started,
		"entered": c.entered,
		"gone":    c.gone,
		"tasks":   runtime.NumGoroutine(),
	}
	if withTimes {
		shown["times"] = c.times
		left := map[string][2]*int64{}
		for key, both := range c.times {
			if both[1] == nil {
				left[key] = both
			}
		}
		c.times = left
	}
	return shown
}

// The agent

func agent(ctx context.Context, o order, write func([]byte) error) error {
	count.start()
	var upstream net.Conn
	defer func() {
		count.enter(o.key)
		if upstream != nil {
			upstream.Close()
		}
		count.leave(o.key)
	}()
	if o.upstream != "" {
		var err error
		var dialer net.Dialer
		upstream, err = dialer.DialContext(ctx, "tcp", "127.0.0.1:"+o.upstream)
		if err != nil {
			upstream = nil
			return err
		}
		if _, err = fmt.Fprintf(upstream, "%s\n", o.key); err != nil {
			return err
		}
	}
	start := time.Now()
	for n := 1; n <= o.events; n++ {
		if err := sleepUntil(ctx, start.Add(time.Duration(n-1)*o.gap)); err != nil {
			return err
		}
		if err := write(frame(o, n)); err != nil {
			return err
		}
	}
	return sleepUntil(ctx, time.Now().Add(o.hold))
}

func sleepUntil(ctx context.Context, when time.Time) error {
	delay := time.Until(when)
	if delay <= 0 {
		return ctx.Err()
	}
	timer := time.NewTimer(delay)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// HTTP

// stream begins a response; what it returns writes to it.
func stream(w http.ResponseWriter) func([]byte) error {
	w.Header().Set("Content-Type", "text/event-stream")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusOK)
	flusher := w.(http.Flusher)
	flusher.Flush()
	return func(data []byte) error {
		if _, err := w.Write(data); err != nil {
			return err
		}
		flusher.Flush()
		return nil
	}
}

func answer(w http.ResponseWriter, status int, value any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(value)
}

func run(w http.ResponseWriter, r *http.Request) {
	write := stream(w)
	if err := agent(r.Context(), orderOf(r.URL.Query()), write); err != nil {
		panic(http.ErrAbortHandler) // a stream that is not complete must not look so
	}
}

// fan is one producer, and a channel for each of those who read what it makes.
type fan struct {
	mutex       sync.Mutex
	isProducing bool
	readers     map[*reader]struct{}
}

type reader struct {
	frames chan []byte
	gone   <-chan struct{}
}

func (f *fan) tell(data []byte) error {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	for each := range f.readers {
		select {
		case each.frames <- data:
		case <-each.gone:
		}
	}
	return nil
}

func (f *fan) produce(o order) {
	agent(context.Background(), o, f.tell)
	f.mutex.Lock()
	defer f.mutex.Unlock()
	f.isProducing = false
	for each := range f.readers {
		close(each.frames)
	}
	f.readers = map[*reader]struct{}{}
}

func (f *fan) start(w http.ResponseWriter, r *http.Request) {
	o := orderOf(r.URL.Query())
	o.stamp = true
	f.mutex.Lock()
	f.isProducing = true
	f.mutex.Unlock()
	go f.produce(o)
	answer(w, http.StatusAccepted, map[string]string{"id": o.runID})
}

func (f *fan) join(ctx context.Context) *reader {
	joined := &reader{make(chan []byte, 256), ctx.Done()}
	f.mutex.Lock()
	defer f.mutex.Unlock()
	if f.isProducing {
		f.readers[joined] = struct{}{}
	} else {
		close(joined.frames)
	}
	return joined
}

func (f *fan) part(parted *reader) {
	f.mutex.Lock()
	defer f.mutex.Unlock()
	delete(f.readers, parted)
}

func (f *fan) watch(w http.ResponseWriter, r *http.Request) {
	write := stream(w)
	joined := f.join(r.Context())
	defer f.part(joined)
	for {
		select {
		case data, ok := <-joined.frames:
			if !ok {
				return
			}
			if err := write(data); err != nil {
				return
			}
		case <-r.Context().Done():
			return
		}
	}
}

func main() {
	runtime.GOMAXPROCS(1) // every server that is measured has one core
	fanned := &fan{readers: map[*reader]struct{}{}}
	http.HandleFunc("/run", run)
	http.HandleFunc("/fan", func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			fanned.start(w, r)
		} else {
			fanned.watch(w, r)
		}
	})
	http.HandleFunc("/counter", func(w http.ResponseWriter, r *http.Request) {
		answer(w, http.StatusOK, count.shown(r.URL.Query().Has("times")))
	})
	listener, err := net.Listen("tcp", "127.0.0.1:0") // its backlog is the system's, as Go has it
	if err != nil {
		log.Fatal(err)
	}
	address := listener.Addr().(*net.TCPAddr)
	json.NewEncoder(os.Stdout).Encode(map[string]any{"host": address.IP.String(), "port": address.Port})
	log.Fatal(http.Serve(listener, nil))
}

package engine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"redoubt.dev/redoubt/programs"
	"redoubt.dev/redoubt/vtpm/journal"
)

// Start runs an engine and returns when it has answered INIT. No TPM2_Startup is sent: the first
// command must be that. ctx bounds the start only.
func Start(ctx context.Context, cfg Config) (*Engine, error) {
	e, err := startEngine(ctx, cfg)
	if err != nil {
		return nil, fmt.Errorf("vTPM engine on %s: %w", cfg.Dir, err)
	}
	return e, nil
}

func startEngine(ctx context.Context, cfg Config) (*Engine, error) {
	if err := checkState(cfg); err != nil {
		return nil, err
	}
	ctl, ctlFile, err := socketpair("control channel")
	if err != nil {
		return nil, err
	}
	defer ctlFile.Close()
	data, dataFile, err := socketpair("data channel")
	if err != nil {
		_ = ctl.Close()
		return nil, err
	}
	defer dataFile.Close()
	proc, err := spawn(&cfg, ctlFile)
	if err != nil {
		_ = ctl.Close()
		_ = data.Close()
		return nil, err
	}
	e := over(cfg, proc, ctl, data)
	// The sooner ours is the only open copy of the engine's ends, the sooner its death shows
	// as an end of file.
	ctlFile.Close()
	err = e.handshake(ctx, dataFile, cfg.Existing)
	if err == nil && cfg.Keep != nil {
		err = e.keep(cfg.Keep)
	}
	if err != nil {
		e.proc.kill()
		_ = ctl.Close()
		_ = data.Close()
		return nil, err
	}
	go e.work()
	return e, nil
}

// over is an Engine of a process and its channels.
func over(cfg Config, proc *process, ctl, data *net.UnixConn) *Engine {
	e := &Engine{
		dir: cfg.Dir, proc: proc, data: data, ctl: control{ctl}, note: cfg.Journal,
		requests: make(chan request), stop: make(chan struct{}), done: make(chan struct{}),
		commandLimit: commandLimit, controlLimit: controlLimit,
	}
	if e.note == nil {
		e.note = journal.Volatile()
	}
	if cfg.commandLimit > 0 {
		e.commandLimit = cfg.commandLimit
	}
	if cfg.controlLimit > 0 {
		e.controlLimit = cfg.controlLimit
	}
	return e
}

// checkState keeps swtpm from its habit of making a new TPM where it finds no state.
func checkState(cfg Config) error {
	file := filepath.Join(cfg.Dir, StateFile)
	st, err := os.Lstat(file)
	switch {
	case errors.Is(err, os.ErrNotExist):
		if cfg.Existing {
			return fmt.Errorf("%w: %s", ErrNoState, file)
		}
		return nil
	case err != nil:
		return err
	case !cfg.Existing:
		return fmt.Errorf("%w: %s, a new one must not replace it", ErrState, file)
	case !st.Mode().IsRegular() || st.Size() == 0:
		return fmt.Errorf("%w: %s is empty or not a regular file", ErrOpen, file)
	}
	return nil
}

// spawn runs the program with its end of the control channel and its key.
func spawn(cfg *Config, ctl *os.File) (*process, error) {
	key, err := keyPipe(&cfg.Key)
	if err != nil {
		return nil, fmt.Errorf("key: %w", err)
	}
	defer key.Close()
	starter := cfg.Starter
	if starter == nil {
		starter = programs.Direct{}
	}
	return start(starter, programs.Program{
		Name: "swtpm", Files: []*os.File{ctl, key}, Dir: cfg.Dir,
		Args: func(dir string) []string {
			return []string{
				"socket", "--tpm2", "--terminate",
				// Its sandbox's list of calls allows less than its own filter does, which takes it a
				// millisecond to make.
				"--seccomp", "action=none",
				// Its group, the manager's, may read the file, which is encrypted, to sync it.
				"--tpmstate", "dir=" + dir + ",mode=0640",
				"--ctrl", "type=unixio,clientfd=3",
				"--key", "fd=4,mode=aes-256-cbc,format=binary",
				"--locality", "reject-locality-4,allow-set-locality",
			}
		},
	})
}

// handshake hands over the data channel and initialises the TPM.
func (e *Engine) handshake(ctx context.Context, dataFile *os.File, existing bool) error {
	limit := time.Now().Add(e.controlLimit)
	// A context that ends cuts the wait short by ending what is waited for.
	cancelled := context.AfterFunc(ctx, func() { e.proc.Kill() })
	defer cancelled()
	fail := func(err error) error {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return e.explain(err)
	}
	caps, err := e.ctl.capability(limit)
	if err != nil {
		return fail(err)
	}
	if caps&capNeeded != capNeeded {
		return fmt.Errorf("swtpm's capabilities %#x lack %#x: a newer swtpm is needed", caps, capNeeded&^caps)
	}
	if _, err := e.ctl.do(limit, ctlSetDataFD, nil, 0, int(dataFile.Fd())); err != nil {
		return fail(err)
	}
	if err := e.init(limit); err != nil {
		return fail(e.openError(err, existing))
	}
	return ctx.Err()
}

// init sends INIT: the TPM is powered on.
func (e *Engine) init(limit time.Time) error {
	var flags [4]byte // no PTM_INIT_FLAG_DELETE_VOLATILE: there is none to delete
	_, err := e.ctl.do(limit, ctlInit, flags[:], 0)
	e.note.SetLocality(0)
	return err
}

// openError names the reason of a failed INIT, which is known from the engine's log only.
func (e *Engine) openError(err error, existing bool) error {
	e.proc.kill() // the log is whole once the process has ended
	var r *resultError
	switch {
	case strings.Contains(e.proc.log.String(), "lock access"):
		return fmt.Errorf("%w (%w): end the other one first", ErrInUse, err)
	case errors.As(err, &r) && existing:
		return fmt.Errorf("%w (%w): the file is damaged or was written with another key; restore it from a copy", ErrOpen, err)
	}
	return err
}

// explain ends the process and adds to a fatal error how it ended, where that says something, and the
// end of its log.
func (e *Engine) explain(err error) error {
	e.proc.kill()
	var r *resultError
	end := ""
	if !errors.As(err, &r) { // else it ran on until now
		end = ", " + e.proc.Exit()
	}
	if l := e.proc.log.String(); l != "" {
		end += ", its log: " + l
	}
	return fmt.Errorf("%w (swtpm process %d%s)", err, e.proc.PID(), end)
}

package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"redoubt.dev/redoubt/network"
	"redoubt.dev/redoubt/process"
	"redoubt.dev/redoubt/services"
	"redoubt.dev/redoubt/services/supervisor"
)

func (a *app) upCommand() *cobra.Command {
	var hostTPM, pool, resets, storeReset, quarantine string
	var uplinks []string
	var users uint32
	var foreground, keepAutogroup bool
	c := &cobra.Command{
		Use:   "up",
		Short: "Start Redoubt's services",
		Long: `Starts Redoubt's services and returns when the API is served. Services that run already
are left as they are.

The vTPM manager's root key is sealed to the host's TPM where --host-tpm names one (by
default /dev/tpmrm0, if it exists), else kept in a file of mode 0600 in the state directory.

The store parses requests in worker processes, each of which is replaced after its response: what
a request did to a worker ends with it. With --store-reset N workers serve N requests, with off
they stay.

Network devices of a tenant's guests are in a network of its own, which leads nowhere without
--uplink: that moves an interface of the host there, where it carries one VLAN untagged, or all with
their tags: into the default tenant's, or with TENANT= into another's, as soon as there is such a
tenant. It loses its addresses and comes back, down, when the tenant is removed or Redoubt ends.

A guest in quarantine (` + "`redoubt quarantine`" + `, or by a verdict) is in the VLAN of --quarantine and reaches only the addresses
that stand there, behind an uplink; without --quarantine it reaches nothing.

The kernel's autogroup (sysctl kernel.sched_autogroup_enabled) is off until ` + "`redoubt down`" + `: with it a guest's devices may
answer a second late while the host has more to do than processors, and a guest's TPM driver gives up sooner. Of several Redoubts on a
host the one that turned it off turns it on again.

A service manager has --foreground and stops with ` + "`redoubt down`" + ` (systemd: ExecStop=): SIGTERM alone ends guests without powering them off.`,
		Example: `  redoubt up
  redoubt up --host-tpm none
  redoubt up --reset blkback=10s    # whoever took it over has it for ten seconds
  redoubt up --pool /srv/guests     # kernels and disks from nowhere else
  redoubt up --store-reset off
  redoubt up --uplink eth1:10 --uplink eth2
  redoubt up --uplink acme=eth3:20    # for tenant acme
  redoubt up --uplink eth2 --quarantine 4000=192.0.2.1    # guests in quarantine reach 192.0.2.1 in VLAN 4000
  redoubt up --foreground    # for a service manager`,
		Args: names(0, "no arguments"),
		RunE: func(c *cobra.Command, _ []string) error {
			if _, err := services.ParseStoreReset(storeReset); err != nil {
				return usagef("--store-reset: %v", err)
			}
			switch hostTPM {
			case "auto":
				hostTPM = ""
				if _, err := os.Stat("/dev/tpmrm0"); err == nil {
					hostTPM = "/dev/tpmrm0"
				}
			case "none":
				hostTPM = ""
			}
			if _, err := services.ParseResets(resets); err != nil {
				return usagef("up: --reset: %v", err)
			}
			uplink := strings.Join(uplinks, ",")
			if _, err := network.ParseUplinks(uplink); err != nil {
				return usagef("up: --uplink: %v", err)
			}
			if _, err := network.ParseQuarantine(quarantine); err != nil {
				return usagef("up: --quarantine: %v", err)
			}
			pool, err := filepath.Abs(pool)
			if err == nil {
				pool, err = filepath.EvalSymlinks(pool)
			}
			if err != nil {
				return usagef("up: --pool: %v", err)
			}
			return a.up(c.Context(), foreground, keepAutogroup, "-host-tpm", hostTPM, "-pool", pool, "-reset", resets, "-users", strconv.Itoa(int(users)), "-store-reset", storeReset, "-uplink", uplink, "-quarantine", quarantine)
		},
	}
	c.Flags().StringVar(&hostTPM, "host-tpm", "auto", "device or socket of the host's TPM, auto, or none")
	c.Flags().StringVar(&pool, "pool", "/", "directory beneath which guests' kernels and disks must lie")
	c.Flags().StringVar(&resets, "reset", "", "how often services are replaced under their guests: SERVICE=DURATION or SERVICE=off, separated by commas (default "+services.DefaultResets+")")
	c.Flags().StringArrayVar(&uplinks, "uplink", nil, "interface of the host that leads out of a tenant's network, [TENANT=]IFACE[:VLAN] (repeatable)")
	c.Flags().StringVar(&quarantine, "quarantine", "", "where guests in quarantine are and what they reach: VLAN[=ADDRESS,...]")
	c.Flags().Uint32Var(&users, "users", services.DefaultUsers, "first of 65536 user ids for services, of nobody else")
	c.Flags().StringVar(&storeReset, "store-reset", services.DefaultStoreReset, services.StoreResetUsage)
	c.Flags().BoolVar(&keepAutogroup, "keep-autogroup", false, "leave the host's kernel.sched_autogroup_enabled as it is")
	c.Flags().BoolVar(&foreground, "foreground", false, "stay; end guests and services at SIGTERM")
	return c
}

// servicesTimeout is how long the services may take to start, and unless the operator says otherwise to answer and to end.
const servicesTimeout = 30 * time.Second

func (a *app) up(ctx context.Context, foreground, keepAutogroup bool, options ...string) error {
	if os.Geteuid() != 0 {
		return errors.New("up: not root: Redoubt makes guests and needs /dev/kvm: use sudo")
	}
	if pid, err := a.running(); err != nil {
		return err
	} else if pid != 0 {
		return a.say(map[string]any{"running": true, "pid": pid}, "Redoubt runs already (process %d)\n", pid)
	}
	if err := os.MkdirAll(filepath.Join(a.runDir, services.LogDir), 0o711); err != nil {
		return fmt.Errorf("up: %w", err)
	}
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	if !keepAutogroup {
		a.scheduleApart(a.autogroup())
	}
	options = append([]string{"--", "-run-dir", a.runDir, "-state-dir", a.stateDir}, options...)
	args := []string{"-lock", filepath.Join(a.runDir, services.LockFile)}
	program := filepath.Join(filepath.Dir(self), "redoubt-supervisor")
	if foreground {
		err := unix.Exec(program, slices.Concat([]string{program}, args, options), process.Env())
		return fmt.Errorf("up: %s: %w", program, err)
	}
	logPath := filepath.Join(a.runDir, services.LogDir, "redoubt-services.log")
	log, err := os.OpenFile(logPath, os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o640)
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	defer log.Close()
	r, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	defer r.Close()
	cmd := exec.Command(program, slices.Concat(args, []string{"-ready-fd", "3"}, options)...)
	cmd.Env = process.Env()
	cmd.Stderr = log
	cmd.ExtraFiles = []*os.File{w}
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	err = cmd.Start()
	w.Close()
	if err != nil {
		return fmt.Errorf("up: %w", err)
	}
	a.progress("starting Redoubt's services")
	defer a.progressEnd()
	if err := r.SetReadDeadline(time.Now().Add(servicesTimeout)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || line != "ready\n" {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("up: the services did not start: %s", lastLogLine(logPath))
	}
	a.progressEnd()
	pid := cmd.Process.Pid
	if err := cmd.Process.Release(); err != nil {
		return err
	}
	return a.say(map[string]any{"running": true, "pid": pid}, "Redoubt is up (process %d)\n", pid)
}

// say prints one result, as JSON or as a line.
func (a *app) say(v map[string]any, format string, args ...any) error {
	if a.json {
		return a.printJSON(v)
	}
	_, err := fmt.Fprintf(a.out, format, args...)
	return err
}

func lastLogLine(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return last
	}
	return "no word in " + path
}

// running is the process id of the Supervisor that holds the run directory's lock, 0 where
// there is none. Only root can tell.
func (a *app) running() (int, error) {
	pid, err := supervisor.Holder(filepath.Join(a.runDir, services.LockFile))
	if errors.Is(err, os.ErrPermission) {
		err = fmt.Errorf("whether Redoubt runs only root can tell: use sudo: %w", err)
	}
	return pid, err
}

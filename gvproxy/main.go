// Command gvproxy is the network of one VM: a gateway with NAT, DNS and DHCP in user space, on the frames of one virtual network card.
//
// It is a small main over the library of the same name, because the stock program serves its control API to the guest on port 80 of the
// gateway, whatever its flags (gvisor-tap-vsock v0.8.9, cmd/gvproxy): a guest could open ports of the host. This one has no control API;
// everything it may do is decided when it is started, and what it listens on was bound by who started it.
//
//	gvproxy -mtu 65520 -forward 4=80 -forward 5=8080
//
// Descriptor 3 is the connection to the card's other end: a stream of frames, each after its length as a big-endian u32 (QEMU's
// `-netdev stream`). Every -forward names an inherited listener and the guest's port its clients are connected to. It ends when the
// connection does.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/containers/gvisor-tap-vsock/pkg/types"
	"github.com/containers/gvisor-tap-vsock/pkg/virtualnetwork"
	"github.com/inetaf/tcpproxy"
	log "github.com/sirupsen/logrus"
)

// The network as src/domain/Network.ts and guest/src/agent/network.rs know it.
const (
	subnet     = "192.168.127.0/24"
	gateway    = "192.168.127.1"
	gatewayMAC = "5a:94:ef:e4:0c:dd"
	guest      = "192.168.127.2"
	// host is where the guest reaches what listens on the host's 127.0.0.1.
	host = "192.168.127.254"
	// nowhere cannot be connected to: connect(2) to a broadcast address fails at once.
	nowhere = "255.255.255.255"

	cardFd = 3
)

// forward connects who comes to an inherited listener to a port of the guest.
type forward struct {
	listener  net.Listener
	guestPort uint16
}

type forwards []forward

func (f *forwards) String() string { return "" }

func (f *forwards) Set(text string) error {
	fdText, portText, found := strings.Cut(text, "=")
	if !found {
		return errors.New("it has the form FD=PORT")
	}
	fd, err := strconv.ParseUint(fdText, 10, 16)
	if err != nil {
		return err
	}
	port, err := strconv.ParseUint(portText, 10, 16)
	if err != nil {
		return err
	}
	file := os.NewFile(uintptr(fd), "listener")
	listener, err := net.FileListener(file)
	_ = file.Close()
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", fd, err)
	}
	*f = append(*f, forward{listener, uint16(port)})
	return nil
}

func main() {
	// What a guest does is no reason to write to the host's disk.
	log.SetOutput(io.Discard)
	var exposed forwards
	mtu := flag.Int("mtu", 1500, "largest packet in bytes, the same as the guest's")
	flag.Var(&exposed, "forward", "`FD=PORT`: an inherited listener and the guest's port; may be repeated")
	flag.Parse()
	if err := run(*mtu, exposed); err != nil {
		fmt.Fprintln(os.Stderr, "gvproxy:", err)
		os.Exit(1)
	}
}

func run(mtu int, exposed forwards) error {
	file := os.NewFile(cardFd, "card")
	card, err := net.FileConn(file)
	_ = file.Close()
	if err != nil {
		return fmt.Errorf("descriptor %d: %w", cardFd, err)
	}
	network, err := virtualnetwork.New(&types.Configuration{
		MTU:               mtu,
		Subnet:            subnet,
		GatewayIP:         gateway,
		GatewayMacAddress: gatewayMAC,
		GatewayVirtualIPs: []string{host},
		// The library dials for the guest whatever has no entry here, the gateway itself included, as if it were an address of the
		// host's network.
		NAT: map[string]string{host: "127.0.0.1", gateway: nowhere},
		DNS: []types.Zone{
			{Name: "machinen.internal.", Records: []types.Record{
				{Name: "host", IP: net.ParseIP(host)},
				{Name: "gateway", IP: net.ParseIP(gateway)},
			}},
			{Name: "docker.internal.", Records: []types.Record{
				{Name: "host", IP: net.ParseIP(host)},
				{Name: "gateway", IP: net.ParseIP(gateway)},
			}},
		},
		Protocol: types.QemuProtocol,
	})
	if err != nil {
		return err
	}
	for _, f := range exposed {
		if err := expose(network, f); err != nil {
			return err
		}
	}
	err = network.AcceptQemu(context.Background(), checked(card))
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// expose serves one forward. A guest that refuses is a client's connection that is closed.
func expose(network *virtualnetwork.VirtualNetwork, f forward) error {
	address := net.JoinHostPort(guest, strconv.Itoa(int(f.guestPort)))
	proxy := &tcpproxy.Proxy{ListenFunc: func(_, _ string) (net.Listener, error) { return f.listener, nil }}
	proxy.AddRoute(f.listener.Addr().String(), &tcpproxy.DialProxy{
		Addr: address,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return network.DialContextTCP(ctx, address)
		},
		OnDialError: func(client net.Conn, _ error) { reset(client) },
	})
	return proxy.Start()
}

// reset closes a connection as a port nobody listens on would.
func reset(client net.Conn) {
	if tcp, ok := client.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = client.Close()
}
